"""Rewards weighed together: caps, targets, weights of prompts, running statistics, and which frames are read."""

import dataclasses
import json

import pytest
import torch

from chopgrad_align.common.errors import UsageError
from chopgrad_align.objective.objective import Objective
from chopgrad_align.objective.reward import FrameReward
from chopgrad_align.objective.statistics import Statistics
from chopgrad_align.objective.terms import RewardTerm

PROMPTS = ["a", "bb"]


class Brightness(FrameReward):
    def score_frames(self, frames, prompts):
        return frames.mean((1, 2, 3))


def length(video, prompts):
    """Reads every frame; a score of the prompt alone would have no gradient."""
    return video.mean((1, 2, 3, 4)) * torch.tensor([len(prompt) for prompt in prompts])


def clip(frames=9):
    return torch.rand(2, frames, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()


def value(score, **term):
    """Of a score, what a term makes of it, and the derivative."""
    statistics = term.pop("statistics", None)
    scores = torch.tensor([score], requires_grad=True)
    result = RewardTerm(Brightness(), **term).value(scores, statistics)
    return result.item(), torch.autograd.grad(result, scores)[0].item()


@pytest.mark.parametrize(
    ("score", "term", "expected"),
    [
        (3.0, {}, (3.0, 1.0)),
        (3.0, {"weight": -2.0}, (-6.0, -2.0)),
        (3.0, {"cap": 5.0}, (3.0, 1.0)),
        (7.0, {"cap": 5.0, "weight": 0.5}, (2.5, 0.0)),
        (7.0, {"cap": 5.0, "weight": -1.0}, (-7.0, -1.0)),  # still to be lowered
        (3.0, {"cap": 5.0, "weight": -1.0}, (-5.0, 0.0)),  # low enough
        (3.0, {"target": 5.0, "weight": 2.0}, (-4.0, 2.0)),
        (7.0, {"target": 5.0, "weight": 2.0}, (-4.0, -2.0)),
        (7.0, {"normalize": True, "weight": 2.0}, (2.0, 1.0)),
        (7.0, {"normalize": True, "cap": 6.0}, (0.5 / 1.0, 0.0)),
        (7.0, {"normalize": True, "target": 6.0}, (-0.5, -0.5)),
    ],
)
def test_the_value_of_a_score(score, term, expected):
    statistics = Statistics(mean=5.0, variance=4.0, least=0.1) if "normalize" in term else None
    assert value(score, statistics=statistics, **term) == expected


def test_a_cap_and_a_target_exclude_each_other():
    with pytest.raises(UsageError, match="a cap or a target, not both"):
        RewardTerm(Brightness(), cap=1.0, target=1.0)


def test_the_sum_is_that_of_its_terms():
    objective = Objective({"one": RewardTerm(Brightness(), 2.0), "other": RewardTerm(length, -0.5)})
    video = clip()
    scores = objective.scores(video, PROMPTS, [0, 1])
    means = video.mean((1, 2, 3, 4))
    torch.testing.assert_close(scores, {"one": means, "other": means * torch.tensor([1.0, 2.0])})
    values = objective.values(scores)
    torch.testing.assert_close(values["one"] + values["other"], means * torch.tensor([1.5, 1.0]))

    weights = {"one": [1.0, 0.0], "other": [3.0, -1.0]}
    weighted = objective.values(scores, weights)
    for name, value in values.items():
        torch.testing.assert_close(weighted[name], value * torch.tensor(weights[name]))
    total = weighted["one"] + weighted["other"]
    (gradient,) = torch.autograd.grad(total.sum(), video)
    pixels = video[0].numel()
    torch.testing.assert_close(gradient[0], torch.full_like(gradient[0], (2 - 1.5) / pixels))
    torch.testing.assert_close(gradient[1], torch.full_like(gradient[1], 1.0 / pixels))


def test_frames_that_are_read():
    def read(*samplers, seeds=(3, 4)):
        terms = {str(i): RewardTerm(Brightness(frames=sampler)) for i, sampler in enumerate(samplers)}
        return Objective(terms).frames_read(9, seeds)

    assert read("first", "last") == [0, 8]
    assert read(3, {"stride": 3}) == [0, 3, 4, 6, 8]
    assert read("first", "all") == list(range(9))
    # One seed a sample, whatever the number of rewards: rewards that draw as many frames draw the same.
    one = read({"random": 2}, seeds=[3])
    assert len(one) == 2
    assert read({"random": 2}, {"random": 2}, seeds=[3]) == one
    assert read({"random": 2}) == sorted({*one, *read({"random": 2}, seeds=[4])})
    assert Objective({"x": RewardTerm(length)}).frames_read(3, [0]) == [0, 1, 2]


def test_unread_frames_can_be_anything():
    objective = Objective(
        {"one": RewardTerm(Brightness(frames=3)), "other": RewardTerm(Brightness(frames={"random": 2}))}
    )
    video = clip()
    seeds = [5, 6]
    read = objective.frames_read(9, seeds)
    assert len(read) < 9
    holes = torch.full_like(video, torch.nan).index_copy(1, torch.tensor(read), video[:, read])
    expected, scores = (objective.scores(v, PROMPTS, seeds) for v in (video, holes))
    torch.testing.assert_close(scores, expected, rtol=0, atol=0)
    gradients = [torch.autograd.grad(sum(s.values()).sum(), video)[0] for s in (expected, scores)]
    torch.testing.assert_close(*gradients)


def test_statistics_follow_the_scores():
    generator = torch.Generator().manual_seed(0)
    statistics = Statistics.of("x", (5 + 2 * torch.randn(64, generator=generator)).tolist())
    assert statistics.mean == pytest.approx(5, abs=0.8)
    assert statistics.std == pytest.approx(2, rel=0.25)
    for _ in range(400):
        statistics = statistics.updated((-3 + 0.5 * torch.randn(8, generator=generator)).tolist())
    assert statistics.mean == pytest.approx(-3, abs=0.2)
    assert statistics.std == pytest.approx(0.5, rel=0.2)
    for _ in range(400):
        statistics = statistics.updated([-3.0] * 8)
    assert statistics.std == statistics.least > 0.1  # a tenth of the first one, however much they agree
    assert Statistics(**json.loads(json.dumps(dataclasses.asdict(statistics)))) == statistics


def test_updates_in_one_piece_or_several_agree_where_nothing_moves():
    # Of a constant stream: the variance decays by the same factor for as many videos, however they are cut.
    first = Statistics(mean=1.0, variance=4.0, least=0.0)
    at_once, twice = first.updated([1.0] * 8), first.updated([1.0] * 4).updated([1.0] * 4)
    assert at_once.variance == pytest.approx(twice.variance, rel=1e-12)
    assert at_once.variance == pytest.approx(4 * (1 - 1 / 256) ** 8)


def test_the_variance_counts_the_move_of_the_mean():
    # Of an exponential average, the moments after weight `rate` has gone from N(0, 1) to a constant 3.
    rate = 1 - (1 - 1 / 256) ** 8
    moved = Statistics(mean=0.0, variance=1.0, least=0.0).updated([3.0] * 8)
    assert moved.mean == pytest.approx(3 * rate)
    assert moved.variance == pytest.approx((1 - rate) * 1 + rate * 9 - (3 * rate) ** 2)


def test_scores_without_spread_cannot_be_normalized():
    objective = Objective({"flat": RewardTerm(Brightness(), normalize=True), "other": RewardTerm(length)})
    with pytest.raises(UsageError, match=r"rewards.flat.normalize: all 3 held-out videos score 0.5, .*leave it out"):
        objective.first_statistics({"flat": [0.5] * 3, "other": [1.0] * 3})
    assert objective.first_statistics({"flat": [0.5, 1.0], "other": [1.0] * 2}).keys() == {"flat"}


def test_a_reward_that_breaks_the_contract_is_named():
    with pytest.raises(
        UsageError, match=r"reward 'mine' returned scores of shape \(\) for a batch of 2, expected \(2,"
    ):
        Objective({"mine": RewardTerm(lambda video, prompts: video.mean())}).scores(clip(), PROMPTS, [0, 1])

"""The check of a reward as a command: what it says of good ones, and why it refuses each kind of broken one."""

import pytest
import torch
from chopgrad_rewards.clip_score import ClipScore
from chopgrad_rewards.colorfulness import Colorfulness
from script_runs import run_script
from torch import nn

from chopgrad_align.common.errors import UsageError
from chopgrad_align.data.video import write_video
from chopgrad_align.evaluation.check_reward import _unlike, ascent, clip, examine, finite_differences, measure
from chopgrad_align.objective.reward import FrameReward, SampledReward

PROMPTS = ["a red star", "a blue square"]
CLIP, CAPTION, _ = clip(None, None)


def mean(video):
    return video.mean((1, 2, 3, 4))


class Contrast(FrameReward):
    """Curved, so that differences agree with the gradient only where steps are small."""

    def score_frames(self, frames, prompts):
        return frames.flatten(1).std(1).exp()


def found(reward):
    return dict(examine(reward, "mine", CLIP[:9], PROMPTS))


@pytest.mark.parametrize(
    ("reward", "frames"),
    [
        (Contrast(), "all 9 frames"),
        (Contrast(frames=2), "frames 0, 8 of 9"),
        (Contrast(frames={"stride": 3}), "frames 0, 3, 6 of 9"),
        (Colorfulness(frames="first"), "frames 0 of 9"),
        (ClipScore(frames={"random": 9}), "all 9 frames"),
        (lambda video, prompts: mean(video).square(), "all 9 frames"),
    ],
)
def test_good_rewards(reward, frames):
    report = found(reward)
    labels = ["clip", "score", "contract", "gradient", "black, grey, white"]
    labels += ["memory", "time", "frames that fit", "finite differences"]
    assert list(report) == labels
    assert report["clip"] == "9 frames of 64x64 on cpu"
    assert frames in report["gradient"]
    with torch.no_grad():
        score = reward(CLIP[None, :9], PROMPTS[:1]).item()
    assert float(report["score"].split()[0]) == pytest.approx(score, rel=1e-4)
    assert float(report["finite differences"].split("error ")[1].split()[0]) < 0.05
    assert int(report["frames that fit"].split()[1].replace(",", "")) > 100


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 0.7 * gradient


class FirstFrame(SampledReward):
    """Says that it reads all frames."""

    def score_video(self, video, prompts):
        return mean(video[:, :1])


class Unasked(SampledReward):
    """Reads more than it says."""

    def forward(self, video, prompts, seeds=None):
        return self.score_video(video, prompts)

    def score_video(self, video, prompts):
        return mean(video)


class Dropout(nn.Module):
    def forward(self, video, prompts):
        return mean(nn.functional.dropout(video))


class RunningMean:
    """Scores relative to what it has seen."""

    def __init__(self):
        self.seen = []

    def __call__(self, video, prompts):
        self.seen.append(mean(video).mean().item())
        return mean(video) - sum(self.seen) / len(self.seen)


class Motion:
    """Mean change between frames: the same forwards, backwards and mirrored."""

    def __call__(self, video, prompts):
        return video.diff(dim=1).square().mean((1, 2, 3, 4))


class Future:
    """Scores a call by the videos of the one before."""

    def __init__(self):
        self.last = None

    def __call__(self, video, prompts):
        last, self.last = self.last, video.detach()
        return mean(video) if last is None else mean(video) + (last.mean() - video.detach().mean())


class Noisy:
    """Draws from a generator of its own, which goes on."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, video, prompts):
        return mean(video) + 0.1 * torch.rand(len(video), generator=self.generator)


def spread(video):
    return video.flatten(1).var(1)


def half_detached(video, prompts):
    return mean(video[:, :, :, :32].detach()) * 0.5 + mean(video[:, :, :, 32:]) * 0.5


def darkens(video, prompts):
    with torch.no_grad():
        video.mul_(0.5)
    return mean(video)


def sorts(video, prompts):
    prompts.sort()
    return mean(video)


def seeds(video, prompts):
    torch.manual_seed(0)
    return mean(video)


BROKEN = {
    "column": (lambda v, p: mean(v)[:, None], r"scores of shape \(2, 1\) for a batch of 2, expected \(2,\): one score"),
    "number": (lambda v, p: mean(v).mean().item(), r"returned a float .*, expected a tensor \(2,\)"),
    "whole": (lambda v, p: (mean(v) * 255).long(), r"returned torch.int64 scores, expected floating point"),
    "detached": (lambda v, p: mean(v.detach()), r"has no gradient: .*remove no_grad, detach"),
    "eightbit": (lambda v, p: mean((v * 255).byte().float()), r"has no gradient: "),
    "constant": (lambda v, p: 0 * mean(v) + 1, r"is constant: its gradient is zero in every pixel of sample 0"),
    "infinite": (lambda v, p: mean(v) / 0, r"is not finite"),
    "nan_gradient": (lambda v, p: mean(v - v).sqrt(), r"gradient that is not finite"),
    "nan_black": (lambda v, p: mean(v) / v.amax((1, 2, 3, 4)), r"score that is not finite on a black video.*epsilon"),
    "nan_grey": (lambda v, p: spread(v).sqrt(), r"gradient that is not finite on a black video"),
    "one_prompt": (lambda v, p: mean(v) * len(p[0]), r"score sample b against prompts\[b\] .* look for prompts\[0\]"),
    "mirrored": (lambda v, p: mean(v).flip(0), r"whatever else is in the batch"),
    "mirrored_motion": (lambda v, p: Motion()(v, p).flip(0), r"whatever else is in the batch"),
    "mirrored_offset": (lambda v, p: 100 + mean(v).flip(0), r"whatever else is in the batch"),
    "coupled": (lambda v, p: mean(v).softmax(0), r"whatever else is in the batch"),
    "coupled_gradient": (
        lambda v, p: mean(v) + mean(v).sum() - mean(v).sum().detach(),
        r"gradient of the first differs from the one that it has alone",
    ),
    "scaled": (lambda v, p: mean(v / v.max()), r"whatever else is in the batch"),
    "in_place": (darkens, r"changes the video that it is given"),
    "in_place_prompts": (sorts, r"changes the prompts that it is given"),
    "seeding": (seeds, r"draws from torch's global random numbers, or seeds them"),
    "random": (lambda v, p: mean(v) + 0.1 * torch.rand(len(v)), r"global random numbers"),
    "dropout": (Dropout(), r"global random numbers.*eval mode"),
    "stateful": (RunningMean(), r"not a function of its arguments: the same videos scored .* call to call"),
    "strided": (
        lambda v, p: mean(v[:, ::4]),
        r"reads 0-8 of 9 frames, .* zero in 1-3, 5-7: derive it from FrameReward or",
    ),
    "first": (
        FirstFrame(),
        r"reads 0-8 of 9 frames, .* zero in 1-8: look for detach, or for a choice of frames inside",
    ),
    "unasked": (
        Unasked(frames="first"),
        r"says that it reads frames 0 of 9, but its gradient reaches 1-8 too: leave the",
    ),
    "wrong_backward": (
        lambda v, p: mean(WrongBackward.apply(v)),
        r"not that of its score: .* \(relative error 4.\de-01\).*exact",
    ),
    "half_detached": (half_detached, r"gradient that is not that of its score"),
    "rounded": (lambda v, p: mean(v + 0.3 * (10 * v).round()), r"gradient that is not that of its score"),
    "threshold": (lambda v, p: mean(0.1 * v + (v > 0.4).to(v)), r"gradient that is not that of its score"),
    "small_jumps": (lambda v, p: mean(v + 0.02 * (10 * v).round()), r"gradient that is not that of its score"),
    "one_jump": (lambda v, p: mean(v + 0.3 * v.round()), r"gradient that is not that of its score"),
    "half_gradient": (lambda v, p: mean(v) * mean(v).detach(), r"gradient that is not that of its score"),
    "future": (Future(), r"whatever else is in the batch|not a function of its arguments"),
    "own_numbers": (Noisy(), r"not a function of its arguments"),
    "next_prompt": (lambda v, p: mean(v) * len(p[-1]), r"score sample b against prompts\[b\]"),
    "loss": (lambda v, p: [mean(v)], r"returned a list"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_the_reason_why_a_reward_is_broken(kind):
    reward, reason = BROKEN[kind]
    with pytest.raises(UsageError, match=rf"^reward 'mine' .*({reason})") as caught:
        found(reward)
    assert "\n" not in str(caught.value)


def test_the_two_samples_are_unlike():
    """Else a reward that swaps scores would not be seen."""
    samples = torch.stack([0.1 + 0.8 * CLIP, _unlike(CLIP)])
    for symmetric in (mean, spread, lambda v: Motion()(v, None), lambda v: v.amax((1, 2, 3, 4))):
        first, second = symmetric(samples)
        assert abs(first - second) > 0.1 * first
    assert samples[1].min() >= 0.15
    assert samples[1].max() <= 0.7


class Rounded(FrameReward):
    exact_gradient = False

    def __init__(self, sign=1.0):
        super().__init__()
        self.sign = sign

    def score_frames(self, frames, prompts):
        levels = frames * 255
        levels = levels + (levels.round() - levels).detach()  # straight through
        return (levels * frames.detach().sign() * self.sign + (1 - self.sign) * levels.detach()).mean((1, 2, 3))


def test_an_approximate_gradient_must_lead_upwards():
    report = found(Rounded())
    assert "finite differences" not in report
    assert report["ascent"].startswith("a step of 1/255 along the gradient, an approximation, raises the score by 1")
    with pytest.raises(UsageError, match=r"leads away: a step of 1/255 along it changes the score by -\d"):
        found(Rounded(sign=-0.5))
    inner = 0.1 + 0.8 * CLIP[None, :3]
    assert ascent(Contrast(), "mine", inner, PROMPTS[:1]) > 0


def test_finite_differences_of_half_precision_are_taken_in_float32():
    class Linear(FrameReward):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 1, 3))

        def score_frames(self, frames, prompts):
            return (frames.to(self.weight.dtype).mean((2, 3)) * self.weight).sum(1)

    error, step = finite_differences(Linear().bfloat16(), "mine", 0.1 + 0.8 * CLIP[None, :3], PROMPTS[:1])
    assert error < 1e-3
    assert step == 0.03


def test_memory_is_that_of_a_chunk_and_of_the_pixels():
    video = 0.1 + 0.8 * CLIP[None]

    class Deep(FrameReward):
        def score_frames(self, frames, prompts):
            for _ in range(20):
                frames = frames.sin()
            return frames.mean((1, 2, 3))

    frame = video[0, 0].nbytes
    whole, chunked = (measure(Deep(frames_per_chunk=n), video, PROMPTS[:1]) for n in (100, 2))
    assert whole.each > 20 * frame
    assert chunked.each < 5 * frame
    assert chunked.peak < whole.peak / 3
    assert chunked.seconds > 0


# --- the command ------------------------------------------------------------------------------------------------------


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    write_video(tmp_path / "a.mp4", CLIP[:5], fps=8)
    video = ["--video", tmp_path / "a.mp4", "--prompt", "a star"]
    options = [*video, "frames={random: 2}", "frames_per_chunk=1"]
    status, printed, _ = run_script("check_reward.py", monkeypatch, capsys, "colorfulness", *options)
    assert status == 0
    printed = printed.splitlines()
    assert printed[0] == "clip                5 frames of 64x64 on cpu"
    assert len(printed) == 9

    (tmp_path / "broken.py").write_text("def make():\n    return lambda video, prompts: video.mean()\n")
    status, _, error = run_script("check_reward.py", monkeypatch, capsys, f"{tmp_path}/broken.py:make")
    assert status == 2
    assert "returned scores of shape () for a batch of 2, expected (2,): one score a sample" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["colorfulnes"], "no reward is called 'colorfulnes'; did you mean 'colorfulness'?"),
        (["colorfulness", "frame=2"], "'frame'; did you mean 'frames'?"),
        (["colorfulness", "frames"], "cannot read the argument 'frames' of colorfulness: write key=value"),
        (["colorfulness", "frames=[1"], "cannot read the argument 'frames=[1' of colorfulness: while parsing"),
        (["colorfulness", "frames=${x}"], "cannot read the argument 'frames=${x}' of colorfulness: "),
        (["colorfulness", "--video", "a.mp4"], "what does a.mp4 show? Give --prompt too"),
        (["colorfulness", "--video", "none.mp4", "--prompt", ""], "cannot read the video none.mp4"),
    ],
)
def test_what_can_be_wrong(monkeypatch, capsys, arguments, message):
    status, printed, error = run_script("check_reward.py", monkeypatch, capsys, *arguments)
    assert status == 2
    assert message in error
    assert not printed

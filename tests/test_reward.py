"""The reward protocol: frames and chunks, the three spellings, and what is said about a wrong reward."""

import importlib.metadata
import sys

import pytest
import torch
from torch import nn

from chopgrad_align.common.errors import UsageError
from chopgrad_align.common.storage_count import StorageCount
from chopgrad_align.objective.reward import (
    FrameReward,
    SampledReward,
    check_reward,
    check_scores,
    frame_sampler,
    load_reward,
)
from chopgrad_align.objective.reward.frames import All, First, FirstLast, Last, Random, Stride, Uniform
from chopgrad_align.objective.reward.protocol import frames_read, score


class Match(FrameReward):
    """A small network in whose score the frame and the length of its prompt interact; float64."""

    def __init__(self, **options):
        super().__init__(**options)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU()).double()
        self.requires_grad_(False)
        self.largest_chunk = 0

    def score_frames(self, frames, prompts):
        self.largest_chunk = max(self.largest_chunk, len(frames))
        lengths = frames.new_tensor([len(prompt) for prompt in prompts])
        return (self.net(frames).mean((1, 2, 3)) * lengths).tanh()


PROMPTS = ["a", "a long prompt", "four"]


def random_video(batch=3, frames=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, frames, 3, 12, 10, generator=generator, dtype=dtype).requires_grad_()


# --- FrameReward ------------------------------------------------------------------------------------------------------


def test_chunks_equal_the_whole():
    video = random_video()
    whole, chunked = Match(frames_per_chunk=100), Match(frames_per_chunk=4)
    expected, scores = whole(video, PROMPTS), chunked(video, PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=0)
    (wanted,) = torch.autograd.grad(expected.sum(), video)
    (gradient,) = torch.autograd.grad(scores.sum(), video)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)
    assert whole.largest_chunk == 21
    assert chunked.largest_chunk == 4


def test_every_prompt_scores_its_own_video():
    video, reward = random_video(), Match(frames_per_chunk=4)
    together = reward(video, PROMPTS)
    alone = [reward(video[b : b + 1], [prompt])[0] for b, prompt in enumerate(PROMPTS)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=0)
    assert not torch.allclose(together, reward(video, PROMPTS[::-1]))


def saved_bytes(reward, video):
    """Bytes of the distinct storages that autograd keeps between forward and backward, the video's own left out."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        reward(video, PROMPTS[: len(video)])
    storages.pop(video.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def test_memory_does_not_grow_with_the_frames():
    short, long = random_video(1, 16), random_video(1, 64)
    one_chunk = saved_bytes(Match(frames_per_chunk=100), random_video(1, 8))
    assert saved_bytes(Match(frames_per_chunk=100), long) > 6 * one_chunk
    for video in (short, long):
        assert saved_bytes(Match(frames_per_chunk=8), video) < one_chunk / 2


def peak(reward, frames):
    """Bytes of a forward and a backward pass beside the video, its gradient and the frames that were chosen of it."""
    video = random_video(1, frames)
    with StorageCount() as storage:
        torch.autograd.grad(reward(video, ["a"]).sum(), video)
    return storage.peak - video.nbytes


def test_the_peak_does_not_grow_with_the_frames():
    chunked = [peak(Match(frames_per_chunk=4), frames) for frames in (8, 64)]
    whole = [peak(Match(frames_per_chunk=100), frames) for frames in (8, 64)]
    a_chunk = whole[0] / 2
    assert chunked[0] < 1.3 * a_chunk
    # Of 56 more frames the gradients of chunks wait to be joined, as large as pixels; activations are 5 times that.
    pixels = random_video(1, 56).nbytes
    assert chunked[1] - chunked[0] < 1.1 * pixels < (whole[1] - whole[0]) / 5
    read = [peak(Match(frames=8, frames_per_chunk=100), frames) for frames in (8, 64)]
    assert read[1] - read[0] < 1.1 * pixels


SAMPLERS = [
    (None, All(), 3, [0, 1, 2]),
    ("all", All(), 3, [0, 1, 2]),
    (5, Uniform(5), 3, [0, 1, 2]),
    (1, Uniform(1), 5, [2]),
    (2, Uniform(2), 9, [0, 8]),
    (3, Uniform(3), 9, [0, 4, 8]),
    ({"uniform": 4}, Uniform(4), 17, [0, 5, 11, 16]),
    ("first", First(), 5, [0]),
    ("last", Last(), 5, [4]),
    ("first+last", FirstLast(), 5, [0, 4]),
    ("first+last", FirstLast(), 1, [0]),
    ({"stride": 3}, Stride(3), 8, [0, 3, 6]),
    ({"stride": 9}, Stride(9), 8, [0]),
    ({"random": 9}, Random(9), 4, [0, 1, 2, 3]),
]


@pytest.mark.parametrize(("frames", "sampler", "total", "selected"), SAMPLERS)
def test_frames_that_are_read(frames, sampler, total, selected):
    assert frame_sampler(frames) == frame_sampler(sampler) == sampler
    reward = Match(frames=frames)
    assert reward.frames == sampler
    assert frames_read(reward, total, [5, 6]) == [selected, selected]
    video = random_video(2, total)
    (gradient,) = torch.autograd.grad(reward(video, ["a", "bc"]).sum(), video)
    touched = gradient.abs().amax((0, 2, 3, 4)).nonzero().flatten().tolist()
    assert touched == selected
    torch.testing.assert_close(reward(video, ["a", "bc"]), Match()(video[:, selected], ["a", "bc"]))


def test_no_graph_without_grad():
    assert not Match(frames_per_chunk=2)(random_video().detach(), PROMPTS).requires_grad
    with torch.no_grad():
        assert not Match(frames_per_chunk=2)(random_video(), PROMPTS).requires_grad


def test_random_frames():
    reward, video = Match(frames={"random": 3}), random_video(3, 11)
    seeds = [7, 8, 7]
    read = frames_read(reward, 11, seeds)
    assert read[0] == read[2] != read[1]
    assert all(len(set(frames)) == 3 and frames == sorted(frames) for frames in read)
    assert {frame for seed in range(99) for frame in Random(3).indices(11, seed)} == set(range(11))

    scores = score(reward, video, PROMPTS, seeds)
    (gradient,) = torch.autograd.grad(scores.sum(), video)
    for b, frames in enumerate(read):
        assert gradient[b].abs().amax((1, 2, 3)).nonzero().flatten().tolist() == frames
        torch.testing.assert_close(scores[b], Match()(video[b : b + 1, frames], PROMPTS[b : b + 1])[0])

    # By itself it draws as everything in torch does.
    torch.manual_seed(0)
    first, second = reward(video, PROMPTS), reward(video, PROMPTS)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(reward(video, PROMPTS), first)


class Motion(SampledReward):
    """How much the chosen frames differ from one to the next."""

    def score_video(self, video, prompts):
        return video.diff(dim=1).square().mean((1, 2, 3, 4))


def test_a_reward_of_frames_together():
    video = random_video(2, 9)
    scores = Motion(frames={"stride": 4})(video, ["", ""])
    torch.testing.assert_close(scores, video[:, ::4].diff(dim=1).square().mean((1, 2, 3, 4)))
    assert frames_read(Motion(frames=2), 9, [0]) == [[0, 8]]
    assert frames_read(lambda video, prompts: None, 3, [0, 1]) == [[0, 1, 2]] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, r"^Match: frames=0: expected a whole number, 1 or more$"),
        ({"frames": 1.5}, r"^Match: frames=1.5: expected a whole number, 1 or more$"),
        ({"frames": True}, r"frames=True: expected a whole number, 1 or more$"),
        ({"frames": {"random": "all"}}, r"frames='all': expected a whole number, 1 or more$"),
        ({"frames": {"stride": -1}}, r"frames=-1: expected a whole number, 1 or more$"),
        ({"frames": "frist"}, r"frames='frist': expected .* \{stride: 4\}, \{first: 4\}; did you mean 'first'\?$"),
        ({"frames": {"rand": 4}}, r"frames=\{'rand': 4\}: expected a whole .*; did you mean 'random'\?$"),
        ({"frames": {"random": 4, "stride": 2}}, r"expected a whole number, all, first, last, first\+last, or one of"),
        ({"frames": [0, 3]}, r"frames=\[0, 3\]: expected"),
        ({"frames_per_chunk": None}, r"^Match: frames_per_chunk=None: expected a whole number, 1 or more$"),
    ],
)
def test_choices_that_are_none(options, message):
    with pytest.raises(UsageError, match=message):
        Match(**options)


@pytest.mark.parametrize(
    ("shape", "prompts", "got"),
    [
        ((2, 3, 3, 8, 8), ["one"], r"\(2, 3, 3, 8, 8\) and 1 prompts"),
        ((2, 3, 8, 8), ["one", "two"], r"\(2, 3, 8, 8\)"),
        ((1, 3, 4, 8, 8), ["one"], r"\(1, 3, 4, 8, 8\)"),
        ((1, 3, 3, 8, 8), "x", "and 'x'"),
    ],
)
def test_shapes_that_do_not_fit(shape, prompts, got):
    with pytest.raises(
        UsageError, match=rf"Match: expected a video \(B, F, 3, H, W\) and a list of B prompts, got.*{got}"
    ):
        Match()(torch.rand(shape, dtype=torch.float64), prompts)


class WrongFrameScores(FrameReward):
    def score_frames(self, frames, prompts):
        return frames.mean()


def test_frame_scores_have_one_value_a_frame():
    with pytest.raises(UsageError, match=r"WrongFrameScores.score_frames returned scores of shape \(\).*\(7,\)"):
        WrongFrameScores()(random_video(1), ["a"])


# --- loading ----------------------------------------------------------------------------------------------------------

SOURCE = """
from dataclasses import dataclass

@dataclass
class Brightness:
    gain: float = 1.0
    def __call__(self, video, prompts):
        return self.gain * video.mean((1, 2, 3, 4))

not_a_class = 3
def makes_none():
    return None
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, holding a reward file that is called like a module of the standard library."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "json.py").write_text(SOURCE)
    return tmp_path


def test_published_name():
    reward = load_reward("colorfulness", frames=2)
    assert isinstance(reward, FrameReward)
    assert reward.frames == Uniform(2)


def test_module_and_class(folder, monkeypatch):
    (folder / "some_rewards.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(folder)
    reward = load_reward("some_rewards:Brightness", gain=2.0)
    assert reward(torch.ones(2, 1, 3, 4, 4), ["", ""]).tolist() == [2.0, 2.0]
    sys.modules.pop("some_rewards")


def test_file_and_class(folder):
    path, modules = list(sys.path), set(sys.modules)
    for name in ("mine/json.py:Brightness", f"{folder}/mine/json.py:Brightness", "./mine/json.py:Brightness"):
        assert load_reward(name, gain=0.5)(torch.ones(1, 1, 3, 4, 4), [""]).tolist() == [0.5]
    assert sys.path == path
    import json

    assert hasattr(json, "dumps")
    assert all(name.startswith("_chopgrad_reward_") for name in set(sys.modules) - modules)


def test_a_loaded_module_is_frozen(folder):
    (folder / "linear.py").write_text("import torch\nclass R(torch.nn.Linear):\n    pass\n")
    reward = load_reward("linear.py:R", in_features=2, out_features=1)
    assert not reward.training
    assert not any(parameter.requires_grad for parameter in reward.parameters())


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "colourfulness",
            {},
            "no reward is called 'colourfulness'; did you mean 'colorfulness'.*Known: .*aesthetic, .*clip_score, ",
        ),
        ("mine/json.py", {}, "for a class in that file, write 'mine/json.py:Class'"),
        ("no_such_package.rewards:R", {}, "no module named 'no_such_package'; install its package.*file.py:Class"),
        ("torch.no_such_module:R", {}, "no module named 'torch.no_such_module'"),
        ("my-rewards:R", {}, "expected a published name, 'package.module:Class' or 'path/to/file.py:Class'"),
        ("mine/jsom.py:R", {}, "no such file .*jsom.py"),
        ("mine/json.py:Brightnes", {}, "has no 'Brightnes'; did you mean 'Brightness'?"),
        ("mine/json.py:not_a_class", {}, "not_a_class is a int, expected a class"),
        ("mine/json.py:makes_none", {}, r"made a NoneType, which cannot be called as reward\(video, prompts\)"),
        ("mine/json.py:Brightness", {"gian": 1}, "'gian'; did you mean 'gain'?.* Its arguments: gain"),
        ("colorfulness", {"frame": 1}, "'frame'; did you mean 'frames'?.* Its arguments: frames, frames_per_chunk"),
        ("broken.py:R", {}, "importing broken.py failed at .*broken.py:2: ZeroDivisionError: division by zero"),
        ("syntax.py:R", {}, "importing syntax.py failed at .*syntax.py:1: SyntaxError"),
        ("needs.py:R", {}, "needs the module 'hpsv2_not_here', which is not installed: pip install hpsv2_not_here"),
    ],
)
def test_a_name_that_cannot_be_loaded(folder, name, args, message):
    (folder / "broken.py").write_text("x = 1\ny = x / 0\n")
    (folder / "syntax.py").write_text("def f(:\n")
    (folder / "needs.py").write_text("import hpsv2_not_here.score\n")
    with pytest.raises(UsageError, match=message):
        load_reward(name, **args)
    assert not any(m.__file__ == str(folder / "broken.py") for m in sys.modules.values() if hasattr(m, "__file__"))


def test_a_missing_package_names_the_extra(folder, monkeypatch):
    (folder / "needs.py").write_text("import lpips\n")
    (folder / "later.py").write_text("def make():\n    import torchmetrics.image\n")
    for module in ("lpips", "torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, module, None)  # what Python itself treats as not installed
    for name in ("needs.py:R", "later.py:make"):
        with pytest.raises(UsageError, match=r"not installed: pip install 'chopgrad-align\[metrics\]'"):
            load_reward(name)


def test_two_packages_with_one_name(monkeypatch):
    entries = [
        importlib.metadata.EntryPoint("sharp", value, "chopgrad_align.rewards") for value in ("a.rewards:S", "b:Sharp")
    ]
    monkeypatch.setattr("chopgrad_align.objective.reward.loading.entry_points", lambda group: entries)
    with pytest.raises(UsageError, match=r"several packages publish a reward 'sharp': choose a\.rewards:S or b:Sharp"):
        load_reward("sharp")


# --- checks -----------------------------------------------------------------------------------------------------------


def mean(video):
    return video.mean((1, 2, 3, 4))


class Root(nn.Module):
    def forward(self, video, prompts):
        return (mean(video) * 0).sqrt()


def test_a_good_reward_passes():
    check_reward(lambda video, prompts: mean(video), "good")
    check_reward(Match(), "good", dtype=torch.float64, frames=3, size=(16, 24), prompts=["one"])
    check_reward(lambda video, prompts: mean(video).softmax(0), "compared within the batch")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda v, p: 0.5, r"returned a float \(0.5\), expected a tensor \(2,\)"),
        (lambda v, p: [0.5, 0.5], r"returned a list"),
        (lambda v, p: mean(v).round().long(), r"returned torch.int64 scores"),
        (lambda v, p: v.mean(), r"shape \(\) for a batch of 2, expected \(2,\): one score a sample"),
        (lambda v, p: v.mean((1, 3, 4)), r"shape \(2, 3\) for a batch of 2"),
        (lambda v, p: mean(v)[:, None], r"shape \(2, 1\)"),
        (lambda v, p: mean(v) / 0, r"not finite: on a video \(2, 5, 3, 64, 64\) it scored \[inf, inf\]"),
        (lambda v, p: mean(v.detach()), r"no gradient: its scores do not require grad; remove no_grad"),
        (lambda v, p: torch.ones(2), r"no gradient"),
        (lambda v, p: torch.ones(2, requires_grad=True) * 1, r"constant: its gradient is zero.*scored \[1.0, 1.0\]"),
        (lambda v, p: mean(v) * 0 + 3, r"constant: its gradient is zero in every pixel of sample 0"),
        (lambda v, p: mean(v)[:1].expand(2), r"constant: its gradient is zero in every pixel of sample 1"),
        (Root(), r"gradient that is not finite"),
    ],
)
def test_a_broken_reward_is_named(reward, message):
    with pytest.raises(UsageError, match=f"reward 'mine' .*{message}"):
        check_reward(reward, "mine")


def test_check_reward_works_under_no_grad():
    with torch.no_grad():
        check_reward(lambda video, prompts: mean(video), "good")


def test_check_scores_returns_them():
    scores = torch.tensor([float("nan"), 1.0])  # finiteness is another guard's business
    assert check_scores("mine", scores, 2) is scores

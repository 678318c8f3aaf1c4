"""Samples that rewards, losses and witnesses are told of beside pixels and prompts, and scores of single frames."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys
from pathlib import Path

import pytest
import tiny_pipelines
import tiny_runs
import torch
from script_runs import run_script
from torch import nn

from chopgrad_align import FrameLoss, FrameReward, SampledReward, Samples, UsageError, load_reward
from chopgrad_align.data.clips import Clip
from chopgrad_align.data.video import write_video
from chopgrad_align.evaluation.check_reward import clip, examine, known_of
from chopgrad_align.evaluation.compare import compare as compare_methods
from chopgrad_align.evaluation.compare import target_video
from chopgrad_align.evaluation.metrics import load_metrics
from chopgrad_align.objective.losses.protocol import compare
from chopgrad_align.objective.reward import check_reward, reduction
from chopgrad_align.objective.reward.protocol import frames_read, reads_sample, score, score_chosen
from chopgrad_align.objective.reward.reduction import Mean, Min, SoftMin, Worst
from chopgrad_align.training.run import train

PROMPTS = ["one", "two"]


def video_of(batch=2, frames=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, frames, 3, 6, 8, generator=generator, dtype=torch.float64)


def known(batch=2, frames=5):
    return Samples(
        batch,
        fps=[8.0 + b for b in range(batch)],
        images=[video_of(1, 1, 1)[0, 0]] + [None] * (batch - 1),
        videos={"target": video_of(batch, frames, 2), "logo": video_of(batch, 1, 3)},
        audio=[torch.full((2, 10), float(b)) for b in range(batch)],
        audio_rate=10,
        rows=[{"name": str(b)} for b in range(batch)],
    )


# --- the samples ------------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_not_known():
    assert Samples(2) == Samples(2, [None, None], [None, None], {}, [None, None], None, [{}, {}])
    assert len(Samples(2)) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Samples(2).fps = (1.0, 1.0)
    with pytest.raises(UsageError, match=r"^Samples: fps has 1 entries, expected one for each of 2 samples$"):
        Samples(2, fps=[8.0])
    with pytest.raises(UsageError, match=r"^Samples: videos\['target'\] has 3 entries, expected one for each of 2"):
        Samples(2, videos={"target": video_of(3)})


def test_samples_are_taken_in_any_order():
    taken = known().take([1, 1, 0])
    assert taken.count == 3
    assert taken.fps == (9.0, 9.0, 8.0)
    assert taken.images[0] is taken.images[1] is None
    assert taken.images[2] is not None
    assert [row["name"] for row in taken.rows] == ["1", "1", "0"]
    assert [sound[0, 0].item() for sound in taken.audio] == [1, 1, 0]
    assert taken.audio_rate == 10
    assert torch.equal(torch.stack(taken.videos["target"]), video_of(2, 5, 2)[[1, 1, 0]])


def test_frames_are_chosen_of_videos_that_are_as_long():
    chosen = known().choose_frames([[0, 2], [1, 4]], 5)
    target = video_of(2, 5, 2)
    assert torch.equal(torch.stack(chosen.videos["target"]), torch.stack([target[0, [0, 2]], target[1, [1, 4]]]))
    assert [len(logo) for logo in chosen.videos["logo"]] == [1, 1]
    frames = chosen.as_frames(2)
    assert frames.count == 4
    assert frames.fps == (8.0, 8.0, 9.0, 9.0)
    assert torch.equal(torch.cat(frames.videos["target"]), torch.cat(chosen.videos["target"]))
    assert [logo.shape[0] for logo in frames.videos["logo"]] == [1] * 4


# --- who asks for them ------------------------------------------------------------------------------------------------


def plain(video, prompts):
    return video.mean((1, 2, 3, 4))


def asking(video, prompts, sample: Samples | None = None):
    return torch.stack([v.mean() * fps for v, fps in zip(video, sample.fps, strict=True)])


class AskingModule(nn.Module):
    def forward(self, video, prompts, sample: Samples | None = None):
        return asking(video, prompts, sample)


class AskingOfVideos(SampledReward):
    """Minus the distance to the target's frames."""

    def score_video(self, video, prompts, sample: Samples | None = None):
        return -(video - torch.stack(sample.videos["target"])).square().mean((1, 2, 3, 4))


class AskingOfFrames(FrameReward):
    def score_frames(self, frames, prompts, sample: Samples | None = None):
        fps = frames.new_tensor(sample.fps)
        return -fps * (frames - torch.cat(sample.videos["target"])).square().mean((1, 2, 3))


@pytest.mark.parametrize("reward", [asking, AskingModule()], ids=["function", "module"])
def test_a_callable_that_asks_is_told(reward):
    video = video_of()
    assert reads_sample(reward)
    scores = score(reward, video, PROMPTS, [0, 0], known())
    torch.testing.assert_close(scores, plain(video, PROMPTS) * torch.tensor([8.0, 9.0]))
    assert not reads_sample(plain)
    assert torch.equal(score(plain, video, PROMPTS, [0, 0], known()), plain(video, PROMPTS))


@pytest.mark.parametrize("frames", [None, {"stride": 2}, {"random": 3}], ids=["all", "stride", "random"])
def test_videos_have_the_frames_that_are_scored(frames):
    video, target, seeds = video_of().requires_grad_(), video_of(2, 5, 2), [3, 4]
    read = frames_read(AskingOfVideos(frames=frames), 5, seeds)
    distances = [(video[b, read[b]] - target[b, read[b]]).square().mean() for b in (0, 1)]
    of_videos = score(AskingOfVideos(frames=frames), video, PROMPTS, seeds, known())
    torch.testing.assert_close(of_videos, -torch.stack(distances))
    expected = -torch.stack(distances) * torch.tensor([8.0, 9.0])
    for chunk in (2, 100):
        of_frames = score(AskingOfFrames(frames=frames, frames_per_chunk=chunk), video, PROMPTS, seeds, known())
        torch.testing.assert_close(of_frames, expected)
        given = torch.autograd.grad(of_frames.sum(), video, retain_graph=True)
        torch.testing.assert_close(given, torch.autograd.grad(expected.sum(), video, retain_graph=True))


@pytest.mark.parametrize("reward", [AskingOfVideos(), AskingOfFrames(frames_per_chunk=2)], ids=["videos", "frames"])
def test_frames_that_come_one_by_one_are_scored_the_same(reward):
    video, one = video_of()[:1], known().take([0])
    expected = score(reward, video, PROMPTS[:1], [0], one)
    torch.testing.assert_close(score_chosen(reward, iter(video[0]), PROMPTS[0], one), expected)


class Unnamed(SampledReward):
    def score_video(self, video, prompts, sample=None):
        return plain(video, prompts)


def needed(video, prompts, sample: Samples):
    return plain(video, prompts)


@pytest.mark.parametrize("reward", [Unnamed(), needed], ids=["untyped", "needed"])
def test_an_argument_of_another_kind(reward):
    with pytest.raises(UsageError, match=r"the argument `sample` is how .*write `sample: Samples \| None = None`"):
        reads_sample(reward)


def test_an_argument_of_another_kind_is_found_when_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def make():\n    return lambda video, prompts, sample=None: video.mean((1, 2, 3, 4))\n"
    )
    with pytest.raises(
        UsageError, match=r"^reward 'mine.py:make': make.<locals>.<lambda>: the argument `sample` is how"
    ):
        load_reward("mine.py:make")


class Weighed(FrameLoss):
    def error(self, frames, target, sample: Samples | None = None):
        weights = frames.new_tensor([len(row["name"]) * fps for row, fps in zip(sample.rows, sample.fps, strict=True)])
        return weights.view(-1, 1, 1) * (frames - target).square().mean(1)


def weighed(video, target, mask=None, sample: Samples | None = None):
    return (video - target).square().mean((1, 2, 3, 4)) * video.new_tensor(sample.fps)


@pytest.mark.parametrize("loss", [Weighed(), Weighed(frames_per_chunk=2), weighed], ids=["whole", "chunks", "function"])
def test_a_loss_that_asks_is_told(loss):
    video, target = video_of(), video_of(seed=5)
    expected = (video - target).square().mean((1, 2, 3, 4)) * torch.tensor([8.0, 9.0])
    torch.testing.assert_close(compare(loss, video, target, None, [0, 1], known()), expected)


# --- scores of frames -------------------------------------------------------------------------------------------------


def of_frames(video, prompts):
    return video.mean((2, 3, 4))


class Brightness(FrameReward):
    def score_frames(self, frames, prompts):
        return frames.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("spelling", "how", "expected"),
    [
        ("mean", Mean(), lambda s: s.mean(1)),
        ("min", Min(), lambda s: s.min(1).values),
        ("worst", Worst(), lambda s: s.sort(1).values[:, :2].mean(1)),  # two of five are the first quarter and more
        ({"worst": 0.2}, Worst(0.2), lambda s: s.min(1).values),
        ({"worst": 0.01}, Worst(0.01), lambda s: s.min(1).values),
        ({"softmin": 0.1}, SoftMin(0.1), lambda s: -0.1 * (-s / 0.1).exp().mean(1).log()),
        ({"softmin": 1e-4}, SoftMin(1e-4), lambda s: s.min(1).values),
        ({"softmin": 1e5}, SoftMin(1e5), lambda s: s.mean(1)),
    ],
    ids=["mean", "min", "worst", "a fifth", "one", "softmin", "cold", "hot"],
)
def test_scores_of_frames_are_reduced_outside(spelling, how, expected):
    assert reduction(spelling) == how
    video = video_of().requires_grad_()
    wanted = expected(of_frames(video, PROMPTS))
    for reward in (of_frames, Brightness(), Brightness(frames_per_chunk=3)):
        scores = score(reward, video, PROMPTS, [0, 0], None, how)
        torch.testing.assert_close(scores, wanted, rtol=1e-3, atol=0)
    assert torch.autograd.gradcheck(how, of_frames(video, PROMPTS).detach().requires_grad_())
    torch.testing.assert_close(score(of_frames, video, PROMPTS, [0, 0]), of_frames(video, PROMPTS).mean(1))
    torch.testing.assert_close(Brightness()(video, PROMPTS), of_frames(video, PROMPTS).mean(1))


def test_one_bad_frame_counts():
    video = torch.full((1, 5, 3, 6, 8), 0.8)
    video[0, 3] = 0.1
    assert score(Brightness(), video, [""], [0]).item() == pytest.approx(0.66)
    assert score(Brightness(), video, [""], [0], None, Min()).item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("maen", r"^reduce='maen': expected mean, min, worst, .*; did you mean 'mean'\?$"),
        ("softmin", r"^reduce='softmin': expected mean, min, worst, \{worst: SHARE\} or \{softmin: TEMPERATURE\}"),
        ({"softmin": 0}, r"^reduce=\{softmin: 0\}: expected a number above 0$"),
        ({"worst": 1.5}, r"^reduce=\{worst: 1.5\}: expected a number above 0, at most 1$"),
        ({"worst": "many"}, r"^reduce=\{worst: 'many'\}: expected a number"),
        ({"mean": 2}, r"expected mean, min"),
    ],
)
def test_reductions_that_are_none(spelling, message):
    with pytest.raises(UsageError, match=message):
        reduction(spelling)


@pytest.mark.parametrize("reward", [plain, AskingOfVideos()], ids=["function", "base"])
def test_nothing_to_reduce(reward):
    with pytest.raises(UsageError, match=r"^reduce: there is one score a video, and none of frames that Min\(\) could"):
        check_reward(reward, "mine", frames=5, size=(6, 8), sample=known(), dtype=torch.float64, reduce=Min())


# --- the scripts ------------------------------------------------------------------------------------------------------

SOURCE = '''
from __future__ import annotations

import torch

from chopgrad_align import FrameReward, SampledReward, Samples


class Likeness(FrameReward):
    """Minus the distance to the first image, times the number in the row."""

    def score_frames(self, frames, prompts, sample: Samples | None = None):
        images = torch.stack(list(sample.images)).to(frames)
        times = frames.new_tensor([float(row.get("times", 1)) for row in sample.rows])
        return -times * (frames - images).square().mean((1, 2, 3))


class Loudness(SampledReward):
    """Brightness times the sound's level."""

    reads_audio = True

    def score_video(self, video, prompts, sample: Samples | None = None):
        level = torch.stack([0 * v.sum() if s is None else s.abs().mean() for v, s in zip(video, sample.audio)])
        return video.mean((1, 2, 3, 4)) * level


class OneForAll(Likeness):
    """The first sample's image for all."""

    def score_frames(self, frames, prompts, sample: Samples | None = None):
        return super().score_frames(frames, prompts, sample.take([0] * len(sample)))
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SOURCE)
    video, _, fps = clip(None, None)
    write_video(tmp_path / "a.mp4", video, fps)
    write_video(tmp_path / "b.mp4", video.flip(0), fps)
    return tmp_path


def test_the_check_tells_it(folder, monkeypatch, capsys):
    status, printed, said = run_script("check_reward.py", monkeypatch, capsys, "mine.py:Likeness")
    assert (status, said) == (0, "")
    base = float(printed.splitlines()[1].split()[1])
    status, printed, _ = run_script("check_reward.py", monkeypatch, capsys, "mine.py:Likeness", "--row", '{"times": 3}')
    assert status == 0
    assert float(printed.splitlines()[1].split()[1]) == pytest.approx(3 * base, rel=1e-4)
    status, _, said = run_script("check_reward.py", monkeypatch, capsys, "mine.py:Likeness", "--row", "[1]")
    assert (status, "--row [1]: expected cells by column, as JSON" in said) == (2, True)
    status, _, said = run_script(
        "check_reward.py", monkeypatch, capsys, "mine.py:Likeness", "--row", '{"image": "none.png"}'
    )
    assert (status, "--row: cannot read none.png" in said) == (2, True)
    assert run_script("check_reward.py", monkeypatch, capsys, "mine.py:Loudness")[0] == 0


def test_the_check_finds_one_image_for_all(folder):
    video, _, fps = clip(None, None)
    with pytest.raises(UsageError, match=r"whatever else is in the batch"):
        list(examine(load_reward("mine.py:OneForAll"), "mine", video, PROMPTS, known_of(video, fps)))


def test_scores_of_a_table_tell_its_columns(folder, monkeypatch, capsys):
    (folder / "table.csv").write_text("video,prompt,image,times\na.mp4,x,a.mp4,1\na.mp4,x,a.mp4,2\nb.mp4,x,a.mp4,1\n")
    status, printed, said = run_script(
        "score.py", monkeypatch, capsys, "--reward", "mine.py:Likeness", "--csv", "table.csv"
    )
    assert status == 0, said
    first, twice, back = (float(row["score"]) for row in csv.DictReader(io.StringIO(printed)))
    assert first < 0
    assert twice == pytest.approx(2 * first, rel=1e-5)
    assert back == pytest.approx(first, rel=0.05)  # the same frames, compressed another time
    status, printed, said = run_script(
        "score.py", monkeypatch, capsys, "--reward", "mine.py:Likeness", "--csv", "table.csv", "--reduce", "min"
    )
    assert float(next(csv.DictReader(io.StringIO(printed)))["score"]) < first
    status, printed, said = run_script(
        "score.py", monkeypatch, capsys, "--reward", "mine.py:Loudness", "--csv", "table.csv"
    )
    assert [float(row["score"]) for row in csv.DictReader(io.StringIO(printed))] == [0, 0, 0]  # silent files
    for how, message in (("worst=x", "--reduce worst=x: expected a number"), ("no", "reduce='no': expected mean")):
        status, _, said = run_script(
            "score.py", monkeypatch, capsys, "--reward", "mine.py:Likeness", "--csv", "table.csv", "--reduce", how
        )
        assert (status, message in said) == (2, True)


# --- the trainer ------------------------------------------------------------------------------------------------------

RECORDING = '''
from __future__ import annotations

from chopgrad_align import Samples

TOLD = []


class Recording:
    """Brightness; remembers what it was told."""

    def __call__(self, video, prompts, sample: Samples | None = None):
        TOLD.append((tuple(video.shape), sample))
        return video.mean((1, 2, 3, 4))


class RecordingLoss:
    def __call__(self, video, target, mask=None, sample: Samples | None = None):
        TOLD.append((tuple(video.shape), sample))
        return (video - target).square().mean((1, 2, 3, 4))
'''


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A module in the current directory, and what its reward and loss were told."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recording.py").write_text(RECORDING)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda: sys.modules["recording"].TOLD
    sys.modules.pop("recording", None)


def test_a_run_on_rows_tells_their_images_and_columns(recorded, tmp_path):
    tiny_pipelines.wan_vace().save_pretrained(tmp_path / "model")
    moving = torch.nn.functional.interpolate(video_of(1, 5)[0].float(), (16, 16))
    write_video(tmp_path / "moving.mp4", moving, 8)
    row = {"prompt": "a", "video": "moving.mp4"}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({**row, "id": i}) for i in (7, 8)))
    own = [f"data.{part}={tmp_path}/rows.jsonl" for part in ("train", "held_out")]
    own += ["train.steps=1", "train.micro_batch=1", "model.fps=12", "rewards.colour.reduce={worst: 0.5}"]
    own += ["rewards.mine.name=recording:Recording", "witnesses.mine.name=recording:Recording"]
    train(tiny_runs.config(tmp_path, tmp_path / "model", *own))
    told = recorded()
    assert {shape[0] for shape, _ in told} == {1, 2}  # 2 of the probe
    for shape, sample in told:
        assert sample.count == shape[0]
        assert sample.fps == (12.0,) * shape[0]
        assert {row["id"] for row in sample.rows} <= {7, 8}
        assert sample.rows[0]["prompt"] == "a"
        (moving,) = {video.shape for video in sample.videos["video"]}
        assert tuple(moving) == (5, 3, 16, 16) == shape[1:]
    assert {row["id"] for _, sample in told for row in sample.rows} == {7, 8}


def test_a_run_on_clips_tells_their_roles(recorded, tmp_path):
    tiny_pipelines.wan_t2v("euler").save_pretrained(tmp_path / "model")
    for i in range(2):
        moving = torch.nn.functional.interpolate(video_of(1, 6, i)[0].float(), (16, 16))
        write_video(tmp_path / "clips" / f"{i}.mp4", moving, 10 + i)
    own = [f"data.{part}={tmp_path}/clips" for part in ("train", "held_out")]
    own += ["data.clips={degradation: {name: downscale, factor: [2, 2]}, caption: a star}"]
    own += ["prediction.mode=one_step", "~rewards.colour", "model.call.guidance_scale=1", "train.steps=1"]
    own += ["losses={mine: {name: 'recording:RecordingLoss'}}", "rewards={also: {name: 'recording:Recording'}}"]
    train(tiny_runs.config(tmp_path, tmp_path / "model", *own))
    for shape, sample in recorded():
        assert {*sample.videos} == {"target", "degraded"}
        assert {round(fps, 3) for fps in sample.fps} <= {10, 11}
        assert {Path(row["name"]).stem for row in sample.rows} <= {"0", "1"}
        assert {tuple(video.shape) for of in sample.videos.values() for video in of} == {shape[1:]}


# --- the evaluation ---------------------------------------------------------------------------------------------------


def test_the_evaluation_tells_a_reward_of_its_clips(folder):
    video, _, fps = clip(None, None)
    bright = Clip("bright", "a star", {"target": video, "image": 0.5 * video[:1]}, fps)
    metric = load_metrics(["reward:mine.py:Likeness"])["reward:mine.py:Likeness"]
    assert metric.higher_is_better
    expected = -(video - 0.5 * video[:1]).square().mean().item()
    assert metric.of_clip(video, bright) == pytest.approx(expected, rel=1e-5)
    table = compare_methods({"mine": target_video}, [bright], {"likeness": metric}, folder / "out")
    assert "likeness" in table.markdown()
    with pytest.raises(UsageError, match="metric 'reward': expected a reward's name behind it"):
        load_metrics(["reward"])

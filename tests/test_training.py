"""The trainer on a tiny Wan: what a run leaves behind, exact resume, gradients, and every way it can go wrong."""

import errno
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny_pipelines
import tiny_runs
import torch
from chopgrad_rewards.colorfulness import Colorfulness
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny_runs import lora, rows

from chopgrad_align.common.errors import UsageError
from chopgrad_align.data.video import read_video
from chopgrad_align.training import batches
from chopgrad_align.training.config_file import load_config
from chopgrad_align.training.folder import RunFolder
from chopgrad_align.training.lora import load_lora
from chopgrad_align.training.run import train


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A run of four steps with everything in it, its config and its result."""
    config = tiny_runs.config(
        tmp_path_factory.mktemp("finished"),
        model,
        "train.steps=4",
        "train.warmup_steps=2",
        "checkpoint.every=1",
        "checkpoint.keep=3",
        "validation.every=2",
        "lora.alpha=8",
        "trackers=[tensorboard]",
        "rewards.bright={name: colorfulness, weight: -0.5, args: {frames: 1}}",
    )
    return SimpleNamespace(config=config, result=train(config), run=RunFolder(config.run.folder))


# --- what a run leaves behind -----------------------------------------------------------------------------------------


def test_run_folder(finished):
    run = finished.run
    assert {path.name for path in run.path.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "heldout.json", "samples", "checkpoints", "lora", "curves.png", "report.html",
    }  # fmt: skip
    assert load_config(run.config) == finished.config
    assert run.config.read_text().startswith(f"# chopgrad-align align --config {run.config}")
    assert run.checkpoints.steps() == [2, 3, 4]
    assert {path.name for path in run.checkpoints.path(4).iterdir()} == {
        "lora.safetensors", "optimizer.pt", "progress.json", "manifest.json",
    }  # fmt: skip
    assert {path.name for path in run.samples.iterdir() if path.is_dir()} == {
        "before", "step-000002", "step-000004", "after",
    }  # fmt: skip
    video, fps = read_video(run.samples / "after" / "000.mp4")
    assert video.shape == (5, 3, 16, 16)
    assert fps == finished.config.model.fps
    assert not (run.samples / "after" / "001.mp4").exists()
    assert run.path.joinpath("curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in run.path.joinpath("report.html").read_text()
    assert not list(run.path.rglob("*.tmp"))


def test_metrics(finished):
    lines = [json.loads(line) for line in (finished.run.path / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in lines if "reward" in row]
    assert [row["step"] for row in training] == [1, 2, 3, 4]
    assert [row["learning_rate"] for row in training] == [0.005, 0.01, 0.01, 0.01]
    for row in training:
        for phase in ("data", "sampling", "decoding", "reward", "backward", "step"):
            assert 0 < row[f"seconds/{phase}"] < 60
        assert 0.1 < row["peak_memory_gib"] < 60
        assert row["reward"] == pytest.approx(row["colour/score"] - 0.5 * row["bright/score"], rel=1e-5)
        assert row["loss"] == -row["reward"]
        assert row["grad_norm"] > 0
        assert row["skipped"] == 0

    held_out = [row for row in lines if "heldout/reward_mean" in row]
    assert [row["step"] for row in held_out] == [0, 2, 4]
    held = json.loads(finished.run.held_out.read_text())
    assert held["prompts"] == ["a large red star", "a blue circle"]
    assert len(set(held["seeds"])) == 2
    for row, scores, stderr in (
        (held_out[0], held["before"], finished.result.stderr_before),
        (held_out[2], held["after"], finished.result.stderr_after),
    ):
        assert row["heldout/reward_mean"] == pytest.approx(sum(scores) / 2)
        assert row["heldout/reward_stderr"] == pytest.approx(stderr)
        total = row["heldout/colour"] - 0.5 * row["heldout/bright"]
        assert row["heldout/reward_mean"] == pytest.approx(total, rel=1e-5)


def test_tensorboard(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = finished.run.path.glob("chopgrad_align/events.out.tfevents.*")
    accumulator = EventAccumulator(str(events)).Reload()
    logged = [(event.step, event.value) for event in accumulator.Scalars("reward")]
    assert logged == [(row["step"], pytest.approx(row["reward"])) for row in rows(finished.run.path)]
    assert [event.step for event in accumulator.Scalars("heldout/reward_mean")] == [0, 2, 4]


@pytest.mark.parametrize(
    ("make", "frames"),
    [
        pytest.param(tiny_pipelines.wan_t2v, 5, id="wan_t2v"),
        pytest.param(lambda: tiny_pipelines.wan_t2v(two_stage=True), 5, id="wan_2.2"),
        pytest.param(tiny_pipelines.cogvideox, 9, id="cogvideox"),
    ],
)
def test_plain_diffusers_with_the_lora_makes_the_same_videos(make, frames, tmp_path):
    # What was measured before and after, bit for bit: the base model was not touched, and alpha (not the rank) is kept.
    make().save_pretrained(tmp_path / "model")
    options = ["lora.alpha=2", "lora.dropout=0.5", "train.steps=1", "gradient.last_steps=3"]
    config = tiny_runs.config(tmp_path, tmp_path / "model", *options, frames=frames)
    train(config)
    held = json.loads((tmp_path / "run" / "heldout.json").read_text())
    assert held["before"] != held["after"]

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)

    def scores():
        call = {**config.model.call, "output_type": "pt"}
        videos = [
            pipe(prompt=[prompt], generator=[torch.Generator().manual_seed(seed)], **call).frames
            for prompt, seed in zip(held["prompts"], held["seeds"], strict=True)
        ]
        return [Colorfulness()(video, [""]).item() for video in videos]

    assert scores() == held["before"]
    folder = tmp_path / "run" / "lora"
    pipe.load_lora_weights(folder)
    if (second := folder / "transformer_2").exists():
        assert scores() != held["after"]
        pipe.load_lora_weights(second, load_into_transformer_2=True)
    assert scores() == held["after"]

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    load_lora(pipe, folder)
    assert scores() == held["after"]


def test_the_reward_rises(configure, tmp_path):
    config = configure(
        *("train.steps=20", "train.batch_size=4", "train.micro_batch=4", "train.learning_rate=2.0e-2"),
        "lora.targets=.*(to_[qkv]|to_out.0|net.0.proj|net.2|proj_out)",
        "gradient.last_steps=3",
        *("validation.pairs=16", "validation.batch=16"),
    )
    colours, things = ("red", "blue", "green", "large"), ("circle", "star", "square", "moving")
    (tmp_path / "held_out.txt").write_text("".join(f"a {c} {t}\n" for c in colours for t in things))
    result = train(config)
    assert result.gain_in_stds > 2
    assert result.p_value < 1e-6
    assert result.count == 16


def test_masters_are_float32_beside_a_bfloat16_model(configure, tmp_path):
    # Updates of this size vanish in bfloat16, whose numbers around 0.01 lie 3e-5 apart.
    train(configure("model.dtype=bfloat16", "train.learning_rate=1.0e-6"))
    first, last = lora(tmp_path / "run", 0), lora(tmp_path / "run", 2)
    assert all(value.dtype == torch.float32 for value in last.values())
    assert all((last[key] != first[key]).any() for key in last)
    optimizer = torch.load(tmp_path / "run" / "checkpoints" / "step-000002" / "optimizer.pt", weights_only=True)
    assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer["optimizer"]["state"].values())


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.fixture
def gradients(monkeypatch):
    """Of each step, before and after clipping."""
    seen = []
    clip = torch.nn.utils.clip_grad_norm_

    def recording(parameters, *args):
        before = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        norm = clip(parameters, *args)
        seen.append((before, torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recording)
    return seen


@pytest.mark.parametrize("size", [2, 4])
def test_the_size_of_a_micro_batch_changes_rounding_only(configure, gradients, size):
    for folder, micro in (("one", 1), ("more", size)):
        name = f"run.folder={configure().run.folder}-{folder}"
        train(configure(name, "train.batch_size=4", f"train.micro_batch={micro}", "train.steps=1"))
    (one, _), (more, _) = gradients
    assert one.norm() > 0
    assert (one - more).norm() <= 1e-4 * one.norm()


def test_clipping(configure, gradients, tmp_path):
    train(configure("train.max_grad_norm=0.125"))
    for (before, after), row in zip(gradients, rows(tmp_path / "run"), strict=True):
        assert row["grad_norm"] == pytest.approx(before.norm().item(), rel=1e-5)
        assert row["grad_norm"] > 0.125
        torch.testing.assert_close(after, before * (0.125 / before.norm()), rtol=1e-4, atol=0)


def test_a_batch_is_drawn_from_shuffled_epochs():
    for count, batch in ((5, 2), (3, 7), (4, 4)):
        drawn = [i for step in range(10 * count) for i in batches._choose(count, batch, 0, step)]
        epochs = [drawn[i : i + count] for i in range(0, len(drawn), count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1
    assert batches._choose(50, 8, 0, 3) != batches._choose(50, 8, 1, 3)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


REWARDS = '''
import os
import torch

def mean(video):
    return video.float().mean((1, 2, 3, 4))

class Faulty:
    """The mean; of the training videos (from 1) in `bad`, what `how` says."""

    def __init__(self, bad=(), how="nan"):
        self.bad, self.how, self.calls = bad, how, -1  # the first call is the probe

    def __call__(self, video, prompts):
        score = mean(video)
        if video.requires_grad:
            self.calls += 1
            if self.calls in self.bad:
                if self.how == "nan":
                    return score * float("nan")
                return score + (score - score.detach()).sqrt()  # finite, its derivative is not
        return score

class Held:
    """Not finite on the videos that are measured, which carry no gradient."""

    def __call__(self, video, prompts):
        return mean(video) if video.requires_grad else mean(video) * float("inf")

def scalar():
    return lambda video, prompts: video.mean()

def constant():
    return lambda video, prompts: mean(video) * 0

def nan():
    return lambda video, prompts: mean(video) / 0

def detached():
    return lambda video, prompts: mean(video).detach()

def number():
    return lambda video, prompts: 3.0
'''


@pytest.fixture
def reward(tmp_path):
    """Overrides that replace the reward by one of the file above."""
    (tmp_path / "faulty.py").write_text(REWARDS)
    return lambda name, **args: f"rewards={{own: {{name: '{tmp_path}/faulty.py:{name}', args: {json.dumps(args)}}}}}"


# --- values that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["nan", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(configure, reward, tmp_path, how):
    # Two videos a step: 3 and 4 are of step 2, 5 of step 3, 9 of step 5.
    options = [reward("Faulty", bad=[4, 5, 9], how=how), "train.steps=6", "checkpoint.every=1", "checkpoint.keep=9"]
    result = train(configure(*options))
    run = tmp_path / "run"
    logged = rows(run)
    assert [row["skipped"] for row in logged] == [0, 1, 2, 2, 3, 3]
    for row in logged:
        assert (row["grad_norm"] is None) == (row["step"] in (2, 3, 5))
        assert (row["reward"] is None) == (how == "nan" and row["step"] in (2, 3, 5))
    weights = [lora(run, step) for step in range(7)]
    for step, row in enumerate(logged, 1):
        moved = any((weights[step][key] != weights[step - 1][key]).any() for key in weights[0])
        assert moved == (row["grad_norm"] is not None)
    assert result.count == 2
    assert json.loads((run / "checkpoints" / "step-000006" / "progress.json").read_text())["skipped"] == 3


def test_three_steps_in_a_row_that_are_not_finite_stop_the_run(configure, reward, tmp_path):
    options = [reward("Faulty", bad=list(range(3, 99))), "train.steps=9", "checkpoint.every=1", "checkpoint.keep=9"]
    with pytest.raises(UsageError, match=r"^3 steps in a row, up to step 4, had a loss or gradient .* not finite"):
        train(configure(*options))
    assert [row["skipped"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3]
    assert_equal(lora(tmp_path / "run", 4), lora(tmp_path / "run", 1))
    assert "training ended early after step 4 of 9" in (tmp_path / "run" / "report.html").read_text()

    # What the error offers is possible, and counts as a new beginning; the reward is healthy for two more videos.
    options = [*options, "train.steps=5", "train.learning_rate=0.002", "train.max_grad_norm=0.5"]
    train(configure(*options), resume=True)
    last = rows(tmp_path / "run")[-1]
    assert (last["step"], last["skipped"], last["learning_rate"]) == (5, 3, pytest.approx(0.002))
    changed = {"train.learning_rate": [0.01, 0.002], "train.max_grad_norm": [1.0, 0.5]}
    assert json.loads((tmp_path / "run" / "resumed.jsonl").read_text()) == {"step": 4, "changed": changed}


def test_a_held_out_score_that_is_not_finite_is_found_before_training(configure, reward):
    with pytest.raises(UsageError, match=r"the reward of a held-out video of the model as it is.*inf"):
        train(configure(reward("Held")))


@pytest.mark.parametrize("cap", ["-9", "null"], ids=["reached", "none"])
def test_a_first_step_without_any_gradient_is_said(configure, capsys, tmp_path, cap):
    train(configure(f"rewards.colour.cap={cap}"))
    assert ("step 1: the gradient is exactly 0" in "".join(capsys.readouterr())) == (cap == "-9")
    assert (rows(tmp_path / "run")[0]["grad_norm"] == 0) == (cap == "-9")


# --- bad input: one clear sentence, and nothing written ---------------------------------------------------------------


def test_dry_run_writes_nothing(configure, tmp_path, capsys):
    config = configure("trackers=[tensorboard]", "lora.rank=2")
    before = sorted(tmp_path.rglob("*"))
    assert train(config, dry_run=True) is None
    assert sorted(tmp_path.rglob("*")) == before
    assert "1,536 trained weights; objective: 1 × colour; 1 process(es) on cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.train={tmp}/none.txt"],
            r"data.train: cannot read .*none.txt: No such file or directory; check the path",
        ),
        (["data.held_out={tmp}/empty.txt"], r"the prompt file .*empty.txt is empty; write at least one prompt"),
        (["data.train={tmp}/images.csv", "train.micro_batch=2"], r"one image a call: set train.micro_batch=1"),
        (["model.name={tmp}/none"], r"model.name: there is no folder .*none; give one, or a hub id such as owner/name"),
        (["model.name={tmp}"], r"model.name: .* holds no diffusers pipeline \(no model_index.json\)"),
        (["model.name=no/body"], r"model.name: cannot load no/body; check the name and the network"),
        (["model.scheduler.name=UniPC"], r"model.scheduler.name: diffusers has no 'UniPC'"),
        (["model.scheduler.flow_shif=3"], r"model.scheduler: Uni\w+ has no setting 'flow_shif'; did you mean 'flow"),
        (["model.call.hight=16"], r"takes no argument 'hight'; did you mean 'height'"),
        (["model.call.height=20"], r"would round height=20; it makes multiples of 8, the nearest is (16|24)$"),
        (["model.call.num_frames=6"], r"would round num_frames=6; it makes 4k \+ 1, the nearest is 5"),
        (["model.call.output_type=np"], r"rollout sets output_type itself"),
        (["train.batch_size=3", "train.micro_batch=2"], r"train.batch_size=3 must be a multiple of .* = 1 × 2"),
        (["lora.targets=[to_qq]"], r"'to_qq' matches no linear layer of transformer \(Wan\w+\); these are .*, to_q,"),
        (["lora.targets=[to_q,to_kk]"], r"lora.targets: 'to_kk' matches no linear layer of transformer"),
        (["lora.targets=to_q"], r"lora.targets: 'to_q' matches no linear layer of transformer"),
        (["lora.targets=to_(q"], r"lora.targets: 'to_\(q' is not a regular expression"),
        (["trackers=[wandb]"], r"trackers: wandb is not installed: pip install 'chopgrad-align\[track\]'"),
        (["rewards.colour.name=colourfulness"], r"no reward is called 'colourfulness'; did you mean 'colorfulness'"),
        (["rewards.colour.args.frame=2"], r"reward 'colorfulness': .*'frame'; did you mean 'frames'"),
        (["rewards.colour.name={tmp}/faulty.py:None_"], r"has no 'None_'"),
        (["rewards.h={{name: hps_v2, args: {{checkpoint: '{tmp}/no.pt'}}}}"], r"cannot be loaded: no such file"),
        (["rewards.own={{name: '{tmp}/faulty.py:scalar'}}"], r"reward 'own' returned scores of shape \(\) for a batch"),
        (["rewards.own={{name: '{tmp}/faulty.py:constant'}}"], r"reward 'own' is constant"),
        (["rewards.own={{name: '{tmp}/faulty.py:nan'}}"], r"reward 'own' is not finite"),
        (["rewards.own={{name: '{tmp}/faulty.py:detached'}}"], r"reward 'own' has no gradient"),
        (["rewards.own={{name: '{tmp}/faulty.py:number'}}"], r"reward 'own' returned a float"),
    ],
)
def test_bad_input(configure, reward, tmp_path, monkeypatch, overrides, message):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    tiny_pipelines.picture().save(tmp_path / "frame.png")
    (tmp_path / "images.csv").write_text("image\nframe.png\n")
    with pytest.raises(UsageError, match=message) as caught:
        train(configure(*(override.format(tmp=tmp_path) for override in overrides)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_not_held_out(configure, tmp_path, capsys):
    train(configure(f"data.held_out={tmp_path / 'train.txt'}"), dry_run=True)
    assert "train.txt is data.train too; what is measured there is not held out\n" in capsys.readouterr().out
    train(configure(), dry_run=True)
    assert "held out" not in capsys.readouterr().out


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_is_never_overwritten(finished):
    content = tree(finished.run.path)
    with pytest.raises(UsageError, match=r"holds a run already, and nothing is overwritten: choose another run.folder"):
        train(finished.config)
    assert tree(finished.run.path) == content


def test_a_folder_that_cannot_be_used(configure, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"run is not empty, and nothing is overwritten"):
        train(configure())
    with pytest.raises(UsageError, match=r"cannot write to .*mine.txt; choose another run.folder=…"):
        train(configure(f"run.folder={tmp_path}/run/mine.txt/deeper"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *args: False)
        with pytest.raises(UsageError, match=r"cannot write to .*; choose another run.folder=…"):
            train(configure(f"run.folder={tmp_path}/other"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
        with pytest.raises(UsageError, match=r"has 1 MiB free, and this run needs 100; free some space"):
            train(configure(f"run.folder={tmp_path}/other"))
    with monkeypatch.context() as patch:  # enough for what every run writes, but not for the checkpoints
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * 2**20))
        with pytest.raises(UsageError, match=r"has 100 MiB free, and this run needs 101; free some space"):
            train(configure(f"run.folder={tmp_path}/other"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "other").exists()


FULL = r"^the disk of .*run is full; free some space and continue with --resume$"


@pytest.mark.parametrize("file", ["optimizer.pt", "lora.safetensors"])
def test_a_disk_that_fills_up_leaves_the_older_checkpoint(configure, tmp_path, monkeypatch, file):
    from pathlib import Path

    write_bytes = Path.write_bytes

    def write(path, data):
        if path.name == file and "step-000002" in str(path):
            write_bytes(path, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_bytes(path, data)

    options = ["train.steps=3", "checkpoint.every=1"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write)
        with pytest.raises(UsageError, match=FULL):
            train(configure(*options))
    assert RunFolder(tmp_path / "run").checkpoints.steps() == [0, 1]
    assert train(configure(*options), resume=True).count == 2


def test_a_disk_that_is_full_at_the_end(configure, tmp_path, monkeypatch):
    # safetensors' own error, as it comes through diffusers.
    from safetensors import SafetensorError

    def save(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", save)
        with pytest.raises(UsageError, match=FULL):
            train(configure())
    assert train(configure(), resume=True).count == 2
    assert load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors")


# --- the command ------------------------------------------------------------------------------------------------------


def test_from_the_command_line(model, tmp_path):
    config = tiny_runs.config_file(tmp_path, model)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += [tiny_runs.SCRIPT, "--config", config, "run.threads=1"]
    done = subprocess.run(launch, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    found = [i for i, line in enumerate(lines) if line.startswith("held-out reward: ")]
    assert "standard deviations" in lines[found[0]]
    assert lines[found[0] + 1].split()[:3] == ["before", "after", "ratio"]  # the witnesses
    assert lines[-1] == f"look at {tmp_path}/run/report.html; the LoRA is in {tmp_path}/run/lora"
    assert "align: 100%" in done.stderr  # the progress bar

    again = [sys.executable, tiny_runs.SCRIPT, "--config", config]
    failed = subprocess.run(again, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/run holds a run already")
    assert "Traceback" not in failed.stderr

"""Runs with several rewards: mixed, normalized, limited, weighed by prompt, each reading frames of its own."""

import itertools
import json

import pytest
import tiny_rewards
import tiny_runs
import tiny_vaes
import torch
from test_rollout import close
from tiny_runs import lora, rows, saved_lora

from chopgrad_align.common.errors import UsageError
from chopgrad_align.data.video import read_video
from chopgrad_align.decoding import selected_frames as partial
from chopgrad_align.decoding.backprop import Exact, Full
from chopgrad_align.decoding.decode import decode
from chopgrad_align.objective.objective import Objective
from chopgrad_align.training.batches import PromptBatches
from chopgrad_align.training.config_file import load_config
from chopgrad_align.training.run import train

OWN = """
from chopgrad_align.objective.reward import FrameReward

class Warmth(FrameReward):
    def score_frames(self, frames, prompts):
        return (frames[:, 0] - frames[:, 2]).mean((1, 2))

class Liar(Warmth):
    \"\"\"Says that it reads the first frame, and reads the last too.\"\"\"

    def forward(self, video, prompts, seeds=None):
        return super().forward(video, prompts, seeds) + video[:, -1].mean((1, 2, 3))
"""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return tiny_rewards.make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py"


def term(key, name, args=(), **options):
    return f"rewards.{key}=" + json.dumps(
        {"name": str(name), **options, "args": {k: str(v) for k, v in dict(args).items()}}
    )


def published(name, checkpoints):
    return {
        "clip_score": {},
        "hps_v2": {"checkpoint": checkpoints / "hps", "model": tiny_rewards.ARCHITECTURE},
        "aesthetic": {"clip": checkpoints / "vit", "head": checkpoints / "head.pth"},
        "colorfulness": {},
        "sharpness": {},
    }[name]


def embedded_run(folder, *rewards):
    """The run of `configs/embedded.yaml`, of one step and with other rewards."""
    config = load_config(
        None,
        [
            f"run.folder={folder}",
            *("model.call.num_frames=5", "model.call.num_inference_steps=2", "gradient.steps.args.count=2"),
            *(
                "train.steps=1",
                "train.batch_size=2",
                "train.micro_batch=2",
                "validation.pairs=2",
                "validation.videos=1",
            ),
            "~train.schedule",
            *rewards,
        ],
    )
    return config, train(config)


def check_mixed(folder, config):
    (row,) = rows(folder)
    assert row["skipped"] == 0
    assert row["grad_norm"] > 0
    assert len(config.rewards) == 2
    assert row["reward"] == pytest.approx(sum(row[f"{key}/value"] for key in config.rewards), rel=1e-5)
    for key, reward in config.rewards.items():
        assert row[f"{key}/value"] == pytest.approx(reward.weight * row[f"{key}/score"], rel=1e-5)
        assert all(f"heldout/{key}" in measured for measured in rows(folder, "heldout/reward_mean"))
    assert any(value.any() for key, value in saved_lora(folder).items() if "lora_B" in key)


def test_the_embedded_run_with_two_rewards(checkpoints, own, tmp_path):
    options = [
        term("video", "aesthetic", published("aesthetic", checkpoints), weight=2.0),
        term("warm", f"{own}:Warmth", weight=-0.5),
    ]
    config, _ = embedded_run(tmp_path / "run", *options)
    check_mixed(tmp_path / "run", config)


NAMES = ["clip_score", "hps_v2", "aesthetic", "colorfulness", "sharpness", "own"]


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(NAMES, 2)))
def test_the_embedded_run_with_any_two_rewards(one, other, checkpoints, own, tmp_path):
    # The first takes the key of the reward that the config has.
    options = [
        term(key, f"{own}:Warmth", weight=weight)
        if name == "own"
        else term(key, name, published(name, checkpoints), weight=weight)
        for key, name, weight in (("video", one, 1.0), ("other", other, 0.25))
    ]
    config, _ = embedded_run(tmp_path / "run", *options)
    check_mixed(tmp_path / "run", config)


# --- everything at once ---------------------------------------------------------------------------------------------


@pytest.fixture
def configure(model, tmp_path):
    """A run with two normalized rewards, a cap, random frames and weights of prompts."""

    def make(name, *overrides):
        options = [
            f"run.folder={tmp_path / name}",
            f"data.train={tmp_path / 'weighted.csv'}",
            f"data.held_out={tmp_path / 'weighted.csv'}",
            "rewards.colour={name: colorfulness, normalize: true, weight: 2, args: {frames: {random: 2}}}",
            "rewards.sharp={name: sharpness, normalize: true, weight: -1, cap: 0, args: {frames: last}}",
            "checkpoint.keep=9",
            "checkpoint.every=1",
            "train.batch_size=2",
            "lora.rank=2",
            *overrides,
        ]
        config = tiny_runs.config(tmp_path, model, *options)
        (tmp_path / "weighted.csv").write_text(
            "prompt,weight,weight.sharp\na red circle,1,0.5\na blue star,2,\na circle spinning,,-1\n"
        )
        return config

    return make


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def progress(folder, step):
    return json.loads((folder / "checkpoints" / f"step-{step:06d}" / "progress.json").read_text())


def test_resume_is_exact(configure, tmp_path):
    expected = train(configure("straight", "train.steps=4", "validation.every=2"))
    train(configure("run", "train.steps=2"))
    result = train(configure("run", "train.steps=4"), resume=True)
    assert result == expected
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")
    for step in (0, 2, 4):
        assert_equal(lora(tmp_path / "run", step), lora(tmp_path / "straight", step))
        assert progress(tmp_path / "run", step) == progress(tmp_path / "straight", step)

    stages = [progress(tmp_path / "run", step) for step in (0, 2, 4)]
    assert stages[0]["running"] == stages[0]["initial"]
    assert stages[0]["initial"] == stages[2]["initial"]
    for name in ("colour", "sharp"):
        means = {stage["running"][name]["mean"] for stage in stages}
        assert len(means) == 3
        # Held-out scores are measured in the spread of the model as it was.
        start = stages[0]["initial"][name]
        raw = [row[f"heldout/{name}"] for row in rows(tmp_path / "run", "heldout/reward_mean")]
        assert start["mean"] == pytest.approx(raw[0], rel=1e-6)
    for row in rows(tmp_path / "run"):
        assert row["reward"] == pytest.approx(row["colour/value"] + row["sharp/value"], rel=1e-4, abs=1e-6)
        assert row["colour/std"] > 0


def test_the_size_of_a_micro_batch_changes_rounding_only(configure, tmp_path):
    for folder, micro in (("one", 1), ("two", 2)):
        train(configure(folder, "train.steps=2", f"train.micro_batch={micro}"))
    for one, other in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    one, other = (torch.cat([v.flatten() for v in lora(tmp_path / run, 2).values()]) for run in ("one", "two"))
    assert close(other, one, 1e-4)


def test_weights_of_prompts_reach_the_gradient(configure, tmp_path):
    off = "prompt,weight\na,0\nb,0\nc,0\n"
    config = configure("run", "train.steps=1")
    (tmp_path / "weighted.csv").write_text(off)
    train(config)
    (row,) = rows(tmp_path / "run")
    assert row["grad_norm"] == row["reward"] == 0
    assert row["colour/score"] > 0


def test_a_weight_of_a_reward_that_is_not_there(configure, tmp_path):
    config = configure("run")
    (tmp_path / "weighted.csv").write_text("prompt,weight.color\na,2\n")
    with pytest.raises(UsageError, match=r"no reward is called as in the column 'weight.color'; did you mean 'colour'"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_reward_without_spread_cannot_be_normalized(configure, monkeypatch):
    held_out = PromptBatches.held_out
    monkeypatch.setattr(PromptBatches, "held_out", lambda self, places: held_out(self, [0 for _ in places]))
    with pytest.raises(UsageError, match=r"rewards.colour.normalize: all 2 held-out videos score .* leave it out"):
        train(configure("run"))


# --- frames that nobody reads -----------------------------------------------------------------------------------------


def test_frames_that_nobody_reads_are_not_decoded(configure, tmp_path, monkeypatch):
    asked = []

    def recording(vae, latents, backprop, frames=None, **kwargs):
        asked.append(frames)
        return decode(vae, latents, backprop, frames, **kwargs)

    monkeypatch.setattr(partial, "decode", recording)
    train(configure("some", "train.steps=3"))
    assert len(asked) == 6
    assert all(2 <= len(frames) <= 3 and frames[-1] == 4 for frames in asked)
    assert len({tuple(frames) for frames in asked}) > 1
    video, _ = read_video(tmp_path / "some" / "samples" / "after" / "000.mp4")
    assert len(video) == 5

    # The same as when all frames are decoded.
    monkeypatch.setattr(Objective, "frames_read", lambda self, total, seeds: list(range(total)))
    train(configure("all", "train.steps=3"))
    for one, other in zip(rows(tmp_path / "all"), rows(tmp_path / "some"), strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_a_reward_that_reads_more_than_it_says_is_found(model, own, tmp_path):
    liar = f"rewards.colour={{name: '{own}:Liar', args: {{frames: first}}}}"
    with pytest.raises(UsageError, match=r"3 steps in a row, .* not finite"):
        train(tiny_runs.config(tmp_path, model, "train.steps=5", liar))


@pytest.mark.parametrize("backprop", [Exact(), Full()])
def test_decode_selected_frames(backprop):
    vae, latents = tiny_vaes.wan_vae(), torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    latents.requires_grad_()
    whole = decode(vae, latents, backprop)
    pixels = partial.decode_selected_frames(vae, latents, backprop, read=lambda total: [0, total - 2], expected=9)
    assert pixels.shape == whole.shape
    assert pixels.isnan().flatten(3).all(3).all(1).all(0).tolist() == [i not in (0, 7) for i in range(9)]
    torch.testing.assert_close(pixels[:, :, [0, 7]], whole[:, :, [0, 7]])
    gradients = [torch.autograd.grad(p[:, :, [0, 7]].square().sum(), latents)[0] for p in (pixels, whole)]
    torch.testing.assert_close(*gradients)

    # Everything, where the call makes another number of frames than was asked for, or all are read.
    for read, asked in ((lambda total: [0], 8), (lambda total: [0], None), (lambda total: list(range(total)), 9)):
        assert torch.equal(partial.decode_selected_frames(vae, latents, backprop, read=read, expected=asked), whole)


def test_decoders_of_chunks_make_all_frames():
    vae, latents = tiny_vaes.temporal_vae(), torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = partial.decode_selected_frames(vae, latents, Exact(), read=lambda total: [0], expected=4, num_frames=4)
    assert pixels.isfinite().all()

"""Runs that are watched: witnesses in every measurement, a guard that ends them, and what is exported then."""

import json

import pytest
import tiny_runs
import torch
from tiny_runs import lora, rows, saved_lora

from chopgrad_align import UsageError, load_config, train
from chopgrad_align.evaluation.changes import changes, summary
from chopgrad_align.training import outcome
from chopgrad_align.training.checkpoints import read_weights

OWN = """
import torch
from chopgrad_align import Guard, Verdict, Witness

class Redness(Witness):
    def observe(self, video, prompts, seeds):
        return video[:, :, 0].mean((1, 2, 3))

class UpTo(Guard):
    "Lets models pass up to a step, and ends the run at another one."

    def __init__(self, passes, ends=99):
        self.passes, self.ends = passes, ends

    def judge(self, baseline, past, now):
        within = now.step <= self.passes
        return Verdict(within, stop=now.step >= self.ends, sentences={} if within else {"own": f"not step {now.step}"})

class Partial:
    "Not finite on the first of three held-out videos, after the first measurement; those carry no gradient."

    def __init__(self):
        self.calls = 0

    def __call__(self, video, prompts):
        score = video.float().mean((1, 2, 3, 4))
        if not video.requires_grad:
            self.calls += 1
            if self.calls > 3 and self.calls % 3 == 1:
                return score * float("nan")
        return score
"""


@pytest.fixture
def configure(model, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return lambda *overrides: tiny_runs.config(tmp_path, model, "run.threads=1", *overrides)


def own_guard(tmp_path, **args):
    return f"guard={{name: '{tmp_path}/own.py:UpTo', args: {json.dumps(args)}}}"


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_witnesses_are_measured_with_every_measurement_and_survive_a_resume(configure, tmp_path):
    options = [
        *("validation.pairs=4", "validation.seeds=2", "checkpoint.every=2", "train.learning_rate=0.1"),
        f"witnesses={{red: {{name: '{tmp_path}/own.py:Redness'}}, sharp: {{name: sharpness}}, flow: null}}",
    ]
    straight = tmp_path / "straight"
    train(configure("train.steps=3", "validation.every=1", *options, f"run.folder={straight}"))
    names = {"motion", "flicker", "saturation", "contrast", "sharpness", "diversity", "distance", "red", "sharp"}
    measured = [json.loads(path.read_text()) for path in sorted((straight / "heldout").glob("step-*.json"))]
    for row, saved in zip(rows(straight, "heldout/reward_mean"), measured, strict=True):
        assert {key.removeprefix("heldout/witness/") for key in row if "/witness/" in key} == names
        assert row["heldout/witness/red"] == pytest.approx(sum(saved["witnesses"]["red"]) / 4)
        assert (row["heldout/witness/distance"] > 0) == (row["step"] > 0)
        assert saved["conditions"] == [0, 0, 1, 1]
        assert len(set(saved["witnesses"]["diversity"])) == 2  # two seeds of a prompt are as far from each other

    held_out = json.loads((straight / "heldout.json").read_text())
    assert held_out["conditions"] == [0, 0, 1, 1]
    assert held_out["witnesses"]["motion"]["before"] == measured[0]["witnesses"]["motion"]
    assert held_out["terms"]["colour"]["before"] == held_out["before"]
    text = "\n".join(summary(straight))
    assert all(name in text and name in (straight / "report.html").read_text() for name in names)

    run = tmp_path / "run"
    train(configure("train.steps=2", "validation.every=1", *options))
    train(configure("train.steps=3", "validation.every=1", *options), resume=True)
    assert rows(run, "heldout/reward_mean") == rows(straight, "heldout/reward_mean")
    assert tree(run / "heldout") == tree(straight / "heldout")
    assert_equal(saved_lora(run), saved_lora(straight))
    assert json.loads((run / "heldout.json").read_text()) == held_out


def test_a_guard_ends_a_run_and_the_best_model_before_is_exported(configure, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["train.steps=4", "validation.every=1", "checkpoint.every=1", "checkpoint.keep=9"]
    result = train(configure(*options, own_guard(tmp_path, passes=1, ends=3)))
    assert "guard: not step 2\n" in capsys.readouterr().out
    assert [row["step"] for row in rows(run)] == [1, 2, 3]
    one = [json.loads((run / "heldout" / f"step-{step:06d}.json").read_text()) for step in range(4)]
    held_out = json.loads((run / "heldout.json").read_text())
    assert [held_out[side] for side in ("before", "after", "last")] == [one[i]["objective"] for i in (0, 1, 3)]
    assert held_out["remarks"][:3] == ["not step 2", "not step 3", "training ended at step 3 of 4"]
    assert held_out["remarks"][3].startswith("lora/ holds step 1, the best within the bounds of 3 measured steps")
    assert result.mean_after == pytest.approx(sum(held_out["after"]) / 2)
    assert [path.name for path in run.glob("checkpoints/best-*")] == ["best-000001"]
    best = read_weights(run / "checkpoints" / "best-000001")
    assert_equal(best, lora(run, 1))
    exported = saved_lora(run)
    assert all(torch.equal(exported[key], best[key]) for key in exported)
    assert (run / "samples/after/000.mp4").read_bytes() == (run / "samples/step-000001/000.mp4").read_bytes()

    # Resumed, it ends where it ended; with a guard that lets it, it goes on as if it had never been held up.
    assert train(configure(*options, own_guard(tmp_path, passes=1, ends=3)), resume=True) == result
    assert [row["step"] for row in rows(run)] == [1, 2, 3]
    train(configure(*options, own_guard(tmp_path, passes=9)), resume=True)
    straight = tmp_path / "straight"
    train(configure(*options, "checkpoint.export=last", f"run.folder={straight}"))
    assert rows(run) == rows(straight)
    assert rows(run, "heldout/reward_mean") == rows(straight, "heldout/reward_mean")
    assert_equal(lora(run, 4), lora(straight, 4))
    straight_export = saved_lora(straight)
    assert all(torch.equal(straight_export[key], lora(straight, 4)[key]) for key in straight_export)


def test_scores_that_are_not_finite_and_pictures_that_fail_cost_nothing(configure, tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise ValueError("no ink")

    monkeypatch.setattr(outcome, "draw_curves", broken)
    monkeypatch.setattr("chopgrad_align.training.measurement.write_video", broken)
    reward = f"rewards={{own: {{name: '{tmp_path}/own.py:Partial'}}}}"
    assert train(configure(reward, "validation.pairs=3")) is not None  # two pairs are left
    run = tmp_path / "run"
    held_out = json.loads((run / "heldout.json").read_text())
    assert sum(score is None for score in held_out["after"]) == 1
    assert held_out["remarks"] == ["no measured step is within the bounds and finite: lora/ holds the last, step 2"]
    assert (run / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert (run / "report.html").is_file()
    out = capsys.readouterr()
    said = out.out + out.err
    assert "curves.png could not be made, and the run goes on without it (ValueError: no ink)" in said
    assert "a sample video could not be made" in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rewards.b={name: sharpness, weight: 0}"], r"rewards.b.weight=0 has no effect.*witnesses.b.name=sharpness"),
        (["witnesses.motoin=null"], r"witnesses.motoin=null leaves out nothing; did you mean 'motion'\?"),
        (["guard.bounds.motoin=0.8"], r"guard.bounds.motoin: there is no such witness; did you mean 'motion'\?"),
        (["witnesses.flow=null", "guard.bounds.flow=0.8"], r"guard.bounds.flow: there is no such witness"),
        (["guard.bounds.motion=1.0"], r"guard.bounds.motion: expected bounds 0 ≤ least < 1 < most"),
        (["guard.bounds.motion=[0.5,0.7]"], r"guard.bounds.motion: expected bounds 0 ≤ least < 1 < most"),
        (["guard.on_breach=panic"], r"guard.on_breach: expected 'warn', 'stop' or 'back', got 'panic'"),
        (["guard.name=x:Y", "guard.patience=3"], r"guard: bounds, patience and on_breach are of the built-in guard"),
        (["witnesses.x={nmae: sharpness}"], r"unknown key 'witnesses.x.nmae'; did you mean 'name'\?"),
        (["checkpoint.export=first"], r"checkpoint.export: expected 'best' or 'last', got 'first'"),
    ],
    ids=["weight", "null", "bound", "left-out", "one", "below", "breach", "two-guards", "key", "export"],
)
def test_what_is_wrong_in_a_config_is_named(configure, overrides, message):
    with pytest.raises(UsageError, match=message):
        configure(*overrides)


def test_a_guard_that_is_none(configure):
    with pytest.raises(UsageError, match=r"guard.name: builtins:dict made a dict, expected a chopgrad_align.Guard"):
        train(configure("guard.name=builtins:dict"))


def test_bounds_come_back_from_a_runs_own_config(configure, tmp_path):
    config = configure("guard.bounds={motion: [0.5, 1.5], flow: null, contrast: 0.9}", "train.steps=1")
    train(config)
    assert load_config(tmp_path / "run" / "config.yaml") == config
    bounds = json.loads((tmp_path / "run" / "heldout.json").read_text())["bounds"]
    assert bounds["motion"] == [0.5, 1.5]
    assert bounds["contrast"] == [0.9, None]
    assert "flow" not in bounds
    assert "sharpness" in bounds


@pytest.mark.slow
def test_a_reward_that_is_easy_to_hack_is_stopped_on_the_embedded_pipeline(tmp_path):
    """Colourfulness alone, at a high learning rate: colours are driven up at the cost of everything else."""
    options = [
        *("~rewards.video", "rewards.colour={name: colorfulness, args: {frames: 4}}", "train.learning_rate=3.0e-3"),
        *("train.steps=16", "train.batch_size=4", "train.micro_batch=4", "train.warmup_steps=0"),
        *(
            "gradient.steps={name: last, args: {count: 1, unconditional: true}}",
            "~train.schedule",
            "run.threads=1",
            "guard.on_breach=stop",
            f"run.folder={tmp_path}/run",
        ),
        *("validation.pairs=8", "validation.seeds=2", "validation.every=2", "validation.batch=8"),
        "model.call.guidance_scale=1.0",
    ]
    train(load_config(None, options))
    print("\n".join(summary(tmp_path / "run")))
    held_out = json.loads((tmp_path / "run" / "heldout.json").read_text())
    assert 0 < held_out["steps"]["after"] < held_out["steps"]["last"] < 16
    assert any(f"of the base model's (bound 1.4) at step {held_out['steps']['last']}" in r for r in held_out["remarks"])
    watched = {change.name: change for change in changes(held_out) if change.bounds}
    assert not any(change.breached(change.after) for change in watched.values())
    assert any(change.breached(change.last) for change in watched.values())
    # Every witness of the exported model is as near to the base model's as the last step's, or nearer.
    for name in ("saturation", "contrast", "motion"):
        assert abs(watched[name].after.ratio - 1) <= abs(watched[name].last.ratio - 1), name

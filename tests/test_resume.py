"""A run is never lost: killed, asked to stop, or started twice, one command ends it as if nothing had happened."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from tiny_runs import lora, rows, saved_lora

from chopgrad_align.common.errors import Interrupted, UsageError, exit_on_usage_error
from chopgrad_align.evaluation.report import write_report
from chopgrad_align.training import checkpoints, measurement, observers, outcome, resume, trainer, validation
from chopgrad_align.training.checkpoints import Checkpoints, write_weights
from chopgrad_align.training.config import Named
from chopgrad_align.training.config_file import load_config, to_yaml
from chopgrad_align.training.fingerprints import fingerprints
from chopgrad_align.training.folder import RunFolder
from chopgrad_align.training.parallel import check_launch
from chopgrad_align.training.run import train
from chopgrad_align.training.stopping import StopRequests

OPTIONS = ["train.steps=4", "checkpoint.every=2", "checkpoint.keep=9", "validation.every=2"]
OPTIONS += ["lora.dropout=0.1", "train.warmup_steps=3", "rewards.bright={name: colorfulness, weight: -0.5}"]


@pytest.fixture(scope="module")
def straight(model, tmp_path_factory):
    """A run that nothing disturbed, begun by `--resume`, and its config and result."""
    config = tiny_runs.config(tmp_path_factory.mktemp("straight"), model, *OPTIONS)
    return SimpleNamespace(config=config, result=train(config, resume=True), run=RunFolder(config.run.folder))


@pytest.fixture
def again(straight, tmp_path):
    """The config of the same run in another folder, with overrides."""
    folder = f"run.folder={tmp_path}/run"
    return lambda *overrides: load_config(straight.run.config, [folder, *overrides])


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same(run, other, step=4):
    """That two folders hold the same run, to the bit."""
    assert rows(run) == rows(other)
    assert rows(run, "heldout/colour") == rows(other, "heldout/colour")
    assert json.loads((run / "heldout.json").read_text()) == json.loads((other / "heldout.json").read_text())
    for one, two in ((lora(run, step), lora(other, step)), (saved_lora(run), saved_lora(other))):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    states = (torch.load(f / f"checkpoints/step-{step:06d}/optimizer.pt", weights_only=True) for f in (run, other))
    one, two = (state["optimizer"]["state"] for state in states)
    assert all(torch.equal(one[i][key], two[i][key]) for i in one for key in one[i])


# --- the one command --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The end of a process: nobody catches it."""


def disturbed(config, owner, name, by, call=1):
    """Resume a run, in which `by` happens after one call of a function; what came of it."""
    original, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(name)
        if len(calls) == call:
            by()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, function)
        with pytest.raises((Killed, Interrupted)) as end:
            train(config, resume=True)
    return end.value, calls


def kill():
    raise Killed


def test_a_run_that_is_killed_everywhere_is_the_run_that_was_not(again, straight, tmp_path):
    disturbed(again(), observers.Observers, "row", kill)  # before the first checkpoint
    disturbed(again(), trainer.Trainer, "step", kill, call=2)
    disturbed(again(), checkpoints, "write_weights", kill)  # into the checkpoint of step 2
    disturbed(again(), validation, "evaluate", kill)  # of step 2, which has been saved
    disturbed(again(), trainer.Trainer, "measure", kill, call=2)  # of the last step, before it is exported
    run = tmp_path / "run"
    held_out = json.loads((run / "heldout.json").read_text())
    assert (held_out["steps"], held_out["interim"]) == ({"before": 0, "after": 4}, True)
    assert held_out["readings"]["bright"]["better"] == "lower"
    write_report(run)
    assert not RunFolder(run).is_complete(4)
    disturbed(again(), outcome, "draw_samples", kill)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # cut off
    (run / ".config.yaml.1.partial").touch()
    (run / "checkpoints" / ".best-000003.tmp").mkdir()
    assert train(again(), resume=True) == straight.result
    assert_same(run, straight.run.path)
    assert not [*run.rglob("*.tmp"), *run.rglob("*.partial")]


def test_signals_end_a_step_or_a_measurement_and_lose_nothing(again, straight, tmp_path):
    run, before = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    # In a measurement the rest of its pairs does not have to be waited for.
    owners = (trainer.Trainer, "step", 1), (measurement, "predict", 2)
    for number, (owner, name, step) in zip((signal.SIGTERM, signal.SIGUSR1), owners, strict=True):
        end, calls = disturbed(again(), owner, name, lambda number=number: os.kill(os.getpid(), number))
        assert isinstance(end, Interrupted)
        assert end.number == number
        assert len(calls) == 1
        assert RunFolder(run).checkpoints.steps()[-1] == step
        assert all(torch.equal(a, b) for a, b in zip(saved_lora(run).values(), lora(run, step).values(), strict=True))
        said = f"ended early by {signal.Signals(number).name} after step {step} of 4"
        assert said in (run / "report.html").read_text()
        assert "held-out pairs were not measured after training" in (run / "report.html").read_text()
    assert signal.getsignal(signal.SIGTERM) is before
    assert train(again(), resume=True) == straight.result
    assert_same(run, straight.run.path)


def test_a_complete_run_is_left_alone(straight, capsys):
    content = tree(straight.run.path)
    assert train(straight.config, resume=True) is None
    assert capsys.readouterr().out == f"{straight.run.path} is complete, with 4 steps: there is nothing to do\n"
    with pytest.raises(UsageError, match=r"^--resume: train.steps=3 is fewer than the 4 steps that are done$"):
        train(load_config(straight.run.config, ["train.steps=3"]), resume=True)
    assert tree(straight.run.path) == content


def test_a_complete_run_can_be_made_longer(again, straight, tmp_path):
    train(again("train.steps=2"), resume=True)
    assert train(again(), resume=True) == straight.result
    assert_same(tmp_path / "run", straight.run.path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("train.betas=[0.5,0.9]", r"--resume: train.betas differs from the run in .*: it has \(0.9, 0.999\), not"),
        ("run.seed=4", "--resume: run.seed differs"),
        ("lora.rank=8", "--resume: lora.rank differs from the run in .*: it has 4, not 8$"),
        ("rewards.colour.weight=2", "--resume: rewards.colour.weight differs"),
        ("rewards.bright.args.frames=2", "--resume: rewards.bright.args.frames differs .*: it has nothing, not 2$"),
        ("rewards.more={name: sharpness}", "--resume: rewards.more.name differs .*: it has nothing, not 'sharpness'$"),
        ("~rewards.bright", "--resume: rewards.bright.name differs .*: it has 'colorfulness', not nothing$"),
        ("gradient.decoder=truncated", "--resume: gradient.decoder differs"),
        ("validation.pairs=3", "--resume: validation.pairs differs"),
        ("train.micro_batch=2", "--resume: train.micro_batch differs"),  # by which masks of dropout are drawn
        ("train.schedule.name=cosine", "--resume: train.schedule"),
    ],
    ids=lambda value: value.split("=")[0].split(".")[-1] if value[0] != "-" else "",
)
def test_resume_of_another_run(straight, changed, message):
    content = tree(straight.run.path)
    with pytest.raises(UsageError, match=message):
        train(load_config(straight.run.config, [changed]), resume=True)
    assert tree(straight.run.path) == content


def test_resume_with_less_memory(again, straight, tmp_path):
    train(again("train.steps=1"))
    less = ["gradient.cache=host", "gradient.rows=4", "gradient.denoiser.checkpoint=block"]
    train(again("model.fps=4", f"data.cache={tmp_path}/kept", *less), resume=True)
    for row, expected in zip(rows(tmp_path / "run"), rows(straight.run.path), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_resume_where_no_run_is(again, straight, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"--resume: .*run is not empty and holds no run \(no config.yaml\); check"):
        train(again(), resume=True)
    shutil.rmtree(run)
    shutil.copytree(straight.run.path, run)
    (run / "report.html").unlink()  # not complete
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UsageError, match=r"--resume: .*checkpoints holds no checkpoint of the 4 steps that were done"):
        train(again(), resume=True)


def test_a_folder_has_one_owner(again, straight, tmp_path):
    shutil.copytree(straight.run.path, tmp_path / "run")
    content = tree(tmp_path / "run")
    with RunFolder(tmp_path / "run").owned(resume=True):
        with pytest.raises(UsageError, match=r"^another process is training in .*run; wait until it has ended, or"):
            train(again("train.steps=5"), resume=True)
        assert tree(tmp_path / "run") == content
    with RunFolder(tmp_path / "new").owned(resume=False), pytest.raises(UsageError, match="another process"):
        train(again(f"run.folder={tmp_path}/new"))
    with pytest.raises(UsageError, match="holds a run already"), RunFolder(tmp_path / "run").owned(resume=False):
        pass  # the other one was faster, and has ended


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path):
    """Checkpoints whose one weight is the step, and a function that adds one."""
    kept = Checkpoints(tmp_path)

    def add(step, **weights):
        with kept.writing(step, {"of": step}) as path:
            write_weights(weights or {"w": torch.full((2,), float(step))}, path)

    return SimpleNamespace(all=kept, add=add, path=kept.path, newest=lambda: kept.newest({"w": torch.zeros(2)}))


def test_a_checkpoint_is_whole_or_not_there(kept):
    for step in (1, 2, 3):
        kept.add(step)
    kept.all.keep(2, until=3)
    assert kept.all.steps() == [2, 3]

    def killed():
        with kept.all.writing(4) as path:
            (path / "half").write_text("half")
            raise Killed

    with pytest.raises(Killed):
        killed()
    assert kept.newest() == (3, [])
    kept.add(4)
    assert {path.name for path in kept.path(4).iterdir()} == {"lora.safetensors", "manifest.json"}
    assert kept.all.facts(4) == {"of": 4}
    kept.add(4)  # again
    assert kept.newest() == (4, [])


def test_what_is_not_ours_is_left_alone(kept, tmp_path):
    for step in (4, 20, 999_999, 1_000_000):
        kept.add(step)
    copies = ["step-000020-best", "step-000004.bak", "step-9999999.old", "step-00000030", "step-2000000"]
    for name in copies:
        shutil.copytree(kept.path(20), tmp_path / name)
    (kept.path(4) / "notes.txt").write_text("the best of all")
    assert kept.all.steps() == [4, 20, 999_999, 1_000_000]
    assert kept.newest() == (1_000_000, [f"{tmp_path}/step-2000000 is left out: it is a copy of step 20"])
    kept.all.keep(1, until=1_000_000)
    assert {path.name for path in tmp_path.iterdir()} == {*copies, "step-000004", "step-1000000"}
    kept.add(2_000_000)
    assert (tmp_path / "step-2000000.other" / "lora.safetensors").is_file()


def test_a_checkpoint_that_is_not_whole_is_named_and_an_older_one_taken(kept):
    for step in (1, 2, 3):
        kept.add(step)
    kept.add(4, w=torch.zeros(3))
    kept.add(5, w=torch.zeros(2), v=torch.zeros(1))
    kept.add(6, v=torch.zeros(2))
    kept.path(7).mkdir()
    file = kept.path(3) / "lora.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    (kept.path(2) / "lora.safetensors").unlink()
    step, sentences = kept.newest()
    assert step == 1
    reasons = ["no manifest.json", "'v' is not expected", "'v' is not expected", r"'w' is (3,), expected (2,)"]
    reasons += ["lora.safetensors is damaged", "lora.safetensors is missing"]
    for folder, reason, sentence in zip((7, 6, 5, 4, 3, 2), reasons, sentences, strict=True):
        assert sentence.startswith(f"{kept.path(folder)} is left out: ")
        assert reason in sentence
    kept.all.keep(1, until=1)  # damaged ones that come later are not counted
    assert kept.newest()[0] == 1


def test_a_run_goes_on_from_the_newest_whole_checkpoint(again, straight, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(straight.run.path, run)
    (run / "report.html").unlink()
    (run / "checkpoints" / "step-000004" / "optimizer.pt").write_bytes(b"")
    assert train(again(), resume=True) == straight.result
    damaged = "step-000004 is left out: optimizer.pt is damaged (its checksum is another); going on from step 2"
    assert damaged in capsys.readouterr().out
    assert_same(run, straight.run.path)


# --- what a run depends on --------------------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A config that reads all kinds of things, and a function that pretends that its run has a checkpoint."""
    monkeypatch.setenv("PROMPTS", str(tmp_path / "held_out.txt"))
    monkeypatch.setenv("TOKEN", "secret-of-mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    (tmp_path / "model" / "weights.safetensors").write_bytes(bytes(2**20 + 9))
    (tmp_path / "own.py").write_text("class Own: pass\n")
    overrides = [f"rewards.own={{name: '{tmp_path}/own.py:Own', args: {{token: '${{oc.env:TOKEN}}', hub: a/b}}}}"]
    overrides += ["data.held_out=${oc.env:PROMPTS}", *OPTIONS]
    config = tiny_runs.config(tmp_path, tmp_path / "model", *overrides)
    folder = RunFolder(config.run.folder)
    folder.path.mkdir()
    folder.write(folder.config, to_yaml(config))
    with folder.checkpoints.writing(1, {"inputs": fingerprints(config), "processes": 1}):
        pass
    return config


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("train.txt", "another\n", r"data.train \(.*train.txt\)"),
        ("held_out.txt", "another\n", r"data.held_out"),
        ("own.py", "class Own: ...\n", r"rewards.own.name \(.*own.py:Own\)"),
        ("model/scheduler.json", "{}", r"model.name \(.*model\)"),
        ("model/weights.safetensors", "x" * (2**20 + 9), r"model.name \(.*model\)"),
    ],
    ids=lambda value: value.split("/")[-1].split(".")[0] if "." in value else "",
)
def test_what_changed_is_named(begun, tmp_path, file, content, named):
    folder = RunFolder(begun.run.folder)
    resume.expect_same_inputs(begun, folder, allow_changed=False)
    (tmp_path / file).write_text(content)
    with pytest.raises(UsageError, match=rf"^--resume: {named} changed after the run was started; .*--allow-changed$"):
        train(begun, resume=True)
    resume.expect_same_inputs(begun, folder, allow_changed=True)


def test_copies_are_the_same_and_the_environment_counts(begun, tmp_path, monkeypatch):
    folder = RunFolder(begun.run.folder)
    os.utime(tmp_path / "model" / "weights.safetensors", (0, 0))
    shutil.copy(tmp_path / "held_out.txt", tmp_path / "copy.txt")
    monkeypatch.setenv("PROMPTS", str(tmp_path / "copy.txt"))
    resume.expect_same_inputs(load_config(folder.config), folder, allow_changed=False)
    monkeypatch.setenv("TOKEN", "another")
    with pytest.raises(UsageError, match=r"--resume: rewards.own.args.token changed after") as caught:
        resume.expect_same_inputs(load_config(folder.config), folder, allow_changed=False)
    assert "another" not in str(caught.value)


def test_the_revision_of_a_model_of_the_hub_counts(begun, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "rewards.own.args.hub" not in fingerprints(begun)
    (tmp_path / "models--a--b" / "refs").mkdir(parents=True)
    (tmp_path / "models--a--b" / "refs" / "main").write_text("0123abc")
    assert fingerprints(begun)["rewards.own.args.hub"] == "0123abc"


def test_the_environment_is_not_written_out(begun):
    folder = RunFolder(begun.run.folder)
    assert begun.rewards["own"].args["token"] == "secret-of-mine"
    written = folder.config.read_text()
    assert "token: ${oc.env:TOKEN}" in written
    assert "held_out: ${oc.env:PROMPTS}" in written
    assert load_config(folder.config) == begun
    assert not any(b"secret-of-mine" in content for content in tree(folder.path).values())


def test_what_is_drawn_by_micro_batch_needs_as_many_processes(begun, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UsageError, match=r"^--resume: the run had 1 process\(es\), not 2, and what is drawn with lora.dr"
    ):
        resume.expect_same_inputs(begun, RunFolder(begun.run.folder), allow_changed=False)
    assert resume.draws_by_micro_batch(begun)
    begun.lora.dropout = 0.0
    resume.expect_same_inputs(begun, RunFolder(begun.run.folder), allow_changed=False)
    begun.prediction.mode = "denoise"
    assert resume.draws_by_micro_batch(begun)


def test_a_schedule_that_reads_the_number_of_steps_keeps_it(begun):
    begun.train.steps = 9
    assert resume.changed_settings(begun, RunFolder(begun.run.folder)) == {}
    begun.train.schedule = Named(name="cosine")
    folder = RunFolder(begun.run.folder)
    folder.write(folder.config, to_yaml(begun))
    begun.train.steps = 10
    with pytest.raises(UsageError, match=r"--resume: train.steps differs from the run in .*: it has 9, not 10$"):
        resume.changed_settings(begun, folder)


# --- launchers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"ACCELERATE_USE_FSDP": "true"},
            r"FSDP \(ACCELERATE_USE_FSDP=true\), which this trainer does not do: set parallel.shard",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed precision .*: set model.dtype instead; change it by"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "torch.compile"),
        (
            {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"},
            "--cpu starts one process, .*: torchrun --nproc_per_node",
        ),
    ],
    ids=["fsdp", "deepspeed", "megatron", "precision", "compile", "cpu"],
)
def test_what_accelerate_is_configured_for_is_not_ignored(again, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        train(again())


def test_what_accelerate_says_by_itself_is_fine(monkeypatch):
    for name, value in {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "USE_CPU": "False"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    check_launch()


def test_a_launcher_that_is_gone_counts_as_a_signal(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    launched = StopRequests()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    by_hand = StopRequests()
    assert launched.number() == by_hand.number() == 0
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert launched.number() == signal.SIGTERM
    assert by_hand.number() == 0


def test_the_second_signal_ends_at_once(monkeypatch):
    def exited(status):
        raise Killed(status)

    monkeypatch.setattr(os, "_exit", exited)
    with StopRequests(say=False) as requests:
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.number() == signal.SIGTERM
        with pytest.raises(Killed) as end:
            os.kill(os.getpid(), signal.SIGUSR1)  # and not SIGINT, which jobs in the background ignore
    assert end.value.args == (128 + signal.SIGUSR1,)


def test_one_of_several_processes_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    for rank in (1, 0):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        with pytest.raises(SystemExit) as end, exit_on_usage_error():
            raise UsageError("a sentence")
        assert end.value.code == 2
        assert json.loads((tmp_path / str(rank) / "error.json").read_text())["message"] == "error: a sentence"
    assert capsys.readouterr().err == "error: a sentence\n"
    with pytest.raises(SystemExit) as end, exit_on_usage_error():
        raise Interrupted(signal.SIGTERM)
    assert end.value.code == 143

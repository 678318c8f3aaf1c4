"""Two processes (torchrun, gloo) compute what one computes with the same batch."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_pipelines
import tiny_runs
import torch
from tiny_runs import lora, rows, saved_lora

from chopgrad_align.training import batches
from chopgrad_align.training.config_file import load_config
from chopgrad_align.training.folder import RunFolder
from chopgrad_align.training.parallel import Replicas
from chopgrad_align.training.run import train

PROMPTS = 12
OVERRIDES = [
    *("train.steps=3", "train.batch_size=4", "checkpoint.every=1", "checkpoint.keep=9"),
    *("validation.pairs=3", "validation.videos=3"),
]

# One reward, for any number of processes; it is not finite for one training prompt.
REWARD = """
import torch

class Mean:
    def __init__(self, bad, world):
        self.bad = bad
        assert (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1) == world

    def __call__(self, video, prompts):
        weight = torch.tensor([float("nan") if prompt == self.bad else 1.0 for prompt in prompts])
        return video.float().mean((1, 2, 3, 4)) * weight
"""

# `scripts/align.py`, and afterwards the trained weights that this process holds, and the bytes of a frozen one.
DRIVER = """
import os, runpy, sys
import torch
from chopgrad_align.training import trainable

original, found = trainable.lora_parameters, []
trainable.lora_parameters = lambda denoisers: found.append(denoisers) or original(denoisers)
folder, script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
denoisers, = found
frozen = denoisers["transformer"].blocks[0].ffn.net[0].proj.weight
held = getattr(frozen, "to_local", lambda: frozen)().untyped_storage().nbytes()
torch.save([*(p.detach() for p in original(denoisers)), held], f"{folder}/rank-{os.environ['RANK']}.pt")
"""


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--master_port", "0", "--rdzv_backend", "c10d"]
TORCHRUN += ["--rdzv_endpoint", "localhost:0", "--nproc_per_node"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(processes, *arguments, **options):
    command = [*map(str, (*TORCHRUN, processes, *arguments))]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, **options)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file, whose reward is not finite for the last video of the second step: the second process has it."""
    folder = tmp_path_factory.mktemp("two")
    tiny_pipelines.wan_t2v().save_pretrained(folder / "model")
    path = tiny_runs.config_file(folder, folder / "model")
    prompts = [
        f"a {size} {colour} star" for size in ("large", "round", "red") for colour in ("red", "blue", "green", "x")
    ]
    assert len(set(prompts)) == PROMPTS
    (folder / "train.txt").write_text("\n".join(prompts) + "\n")
    (folder / "reward.py").write_text(REWARD)
    bad = prompts[batches._choose(PROMPTS, 4, load_config(path).run.seed, 1)[3]]
    text = path.read_text()
    own = f"rewards:\n  mean: {{name: '{folder}/reward.py:Mean', args: {{bad: '{bad}', world: 1}}}}\n"
    path.write_text(text.replace("rewards:\n  colour: {name: colorfulness}\n", own))
    return path


@pytest.fixture(scope="module")
def one(config, tmp_path_factory):
    """The run that one process makes."""
    run = tmp_path_factory.mktemp("one") / "run"
    train(load_config(config, [*OVERRIDES, f"run.folder={run}"]))
    return run


def test_what_no_process_has_a_gradient_of_keeps_none():
    here, there, nowhere = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    here.grad, others = torch.tensor([1.0, 2.0]), iter([torch.tensor([1.0, 1.0, 0.0]), torch.tensor([3.0, 4, 5, 6])])

    class Two(Replicas):
        def __init__(self):
            self.world, self.device = 2, torch.device("cpu")

        def sum(self, own):
            return own + next(others)

    Two().sum_gradients([here, there, nowhere])
    assert here.grad.tolist() == [4, 6]
    assert there.grad.tolist() == [5, 6]
    assert nowhere.grad is None


def test_two_processes_compute_what_one_does(config, one, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    two = [f"run.folder={tmp_path}/two", "rewards.mean.args.world=2", "train.micro_batch=4"]  # each has two
    done = launch(2, driver, tmp_path, tiny_runs.SCRIPT, "--config", config, *OVERRIDES, *two)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    assert done.stdout.count("held-out reward") == 1
    assert done.stderr.count("encoding prompts:   0%") == 1

    # Every process holds the weights that were saved.
    ranks, _ = held_by_ranks(tmp_path)
    assert sum(weight.numel() for weight in ranks[0]) == sum(v.numel() for v in saved_lora(tmp_path / "two").values())
    assert all(torch.equal(one, other) for one, other in zip(*ranks, strict=True))
    norms = [sum(w.norm() ** 2 for w in weights) for weights in (ranks[0], saved_lora(tmp_path / "two").values())]
    torch.testing.assert_close(*norms)

    # The gradients, of which AdamW's first moments are made, and the weights are those of one process.
    for step in (1, 3):
        expect_close(moments(tmp_path / "two", step), moments(one, step), 1e-4)
        expect_close(flat_lora(tmp_path / "two", step), flat_lora(one, step), 1e-4)
    for alone, both in zip(rows(one), rows(tmp_path / "two"), strict=True):
        assert alone["skipped"] == (alone["step"] > 1)  # both processes, though one of them alone saw it
        assert numbers(both) == pytest.approx(numbers(alone), rel=1e-4)

    expect_same_held_out(one, tmp_path / "two")
    assert len(list((tmp_path / "two" / "samples" / "after").glob("*.mp4"))) == 3


@pytest.mark.parametrize(
    "options", [[], ["model.dtype=bfloat16", "model.gradient_checkpointing=true"]], ids=["float32", "bfloat16"]
)
def test_two_processes_that_share_one_denoiser_compute_what_one_does(config, tmp_path, options):
    run = [*OVERRIDES, *options, "gradient.last_steps=2"]
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    two = [f"run.folder={tmp_path}/two", "rewards.mean.args.world=2", "parallel.shard=2"]
    done = launch(2, driver, tmp_path, tiny_runs.SCRIPT, "--config", config, *run, *two)
    assert done.returncode == 0, done.stderr
    train(load_config(config, [*run, f"run.folder={tmp_path}/one"]))
    for step in (1, 3):
        expect_close(moments(tmp_path / "two", step), moments(tmp_path / "one", step), 1e-5)
        expect_close(flat_lora(tmp_path / "two", step), flat_lora(tmp_path / "one", step), 5e-5)  # Adam: signs of zeros
    expect_same_held_out(tmp_path / "one", tmp_path / "two")
    trained, held = held_by_ranks(tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))
    weight = tiny_pipelines.wan_t2v().transformer.blocks[0].ffn.net[0].proj.weight
    assert held == [weight.numel() * (2 if options else 4) // 2] * 2


# AdamW whose step is smooth about a gradient of zero, of which rounding would decide the sign.
ON_ONE_CLIP = [*OVERRIDES, "gradient.last_steps=2", "train.optimizer.name=torch.optim.AdamW"]
ON_ONE_CLIP += ["train.optimizer.args.eps=1e-4"]


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The run that one process makes, with two steps that carry gradient."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(load_config(config, [*ON_ONE_CLIP, f"run.folder={run}"]))
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (2, ["parallel.context=2"]),
        (2, ["parallel.context=2", "parallel.shard=2"]),
        (4, ["parallel.context=2", "parallel.shard=2"]),
    ],
    ids=["context", "within", "product"],
)
def test_processes_that_work_on_one_clip_compute_what_one_does(config, alone, tmp_path, processes, layout):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    run = [f"run.folder={tmp_path}/run", f"rewards.mean.args.world={processes}", *layout]
    done = launch(processes, driver, tmp_path, tiny_runs.SCRIPT, "--config", config, *ON_ONE_CLIP, *run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out reward") == 1
    for step in (1, 3):
        expect_close(moments(tmp_path / "run", step), moments(alone, step), 1e-5)
        expect_close(flat_lora(tmp_path / "run", step), flat_lora(alone, step), 1e-5)
    for one, several in zip(rows(alone), rows(tmp_path / "run"), strict=True):
        assert numbers(several) == pytest.approx(numbers(one), rel=1e-4)
    expect_same_held_out(alone, tmp_path / "run")
    assert len(list((tmp_path / "run" / "samples" / "after").glob("*.mp4"))) == 3
    trained, held = held_by_ranks(tmp_path, processes)
    assert all(
        torch.equal(weight, other) for weights in trained for weight, other in zip(weights, trained[0], strict=True)
    )
    weight = tiny_pipelines.wan_t2v().transformer.blocks[0].ffn.net[0].proj.weight
    assert held == [weight.numel() * 4 // len(layout)] * processes


@pytest.mark.slow
def test_a_run_with_two_processes_a_clip_is_continued_by_one(config, alone, tmp_path):
    options = [*ON_ONE_CLIP, f"run.folder={tmp_path}/run"]
    two = ["train.steps=1", "parallel.context=2", "rewards.mean.args.world=2"]
    done = launch(2, tiny_runs.SCRIPT, "--config", config, *options, *two)
    assert done.returncode == 0, done.stderr
    saved = tmp_path / "run" / "config.yaml"
    saved.write_text(saved.read_text().replace("world: 2", "world: 1"))
    train(load_config(config, options), resume=True)
    expect_close(flat_lora(tmp_path / "run", 3), flat_lora(alone, 3), 1e-5)


def held_by_ranks(folder, processes=2):
    """Of all processes the trained weights, and the bytes that they hold of a frozen one."""
    ranks = [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(processes)]
    return [weights for *weights, _ in ranks], [held for *_, held in ranks]


def expect_close(found, expected, tolerance):
    assert expected.norm() > 0
    assert (found - expected).norm() <= tolerance * expected.norm()


def flat_lora(run, step):
    return torch.cat([weight.flatten() for weight in lora(run, step).values()])


def expect_same_held_out(one, two):
    """Held-out pairs were shared out unevenly, and came back in order."""
    one, two = (json.loads((run / "heldout.json").read_text()) for run in (one, two))
    assert two["prompts"] == one["prompts"]
    assert two["before"] == pytest.approx(one["before"], rel=1e-6)
    assert two["after"] == pytest.approx(one["after"], rel=1e-5)
    assert one["after"] != pytest.approx(one["before"], rel=1e-4)
    assert two["witnesses"].keys() == one["witnesses"].keys() >= {"motion", "distance"}
    assert two["witnesses"]["motion"]["after"] == pytest.approx(one["witnesses"]["motion"]["after"], rel=1e-4)


def numbers(row):
    return {key: -1.0 if value is None else value for key, value in row.items()}


def moments(run, step):
    optimizer = torch.load(run / "checkpoints" / f"step-{step:06d}" / "optimizer.pt", weights_only=True)
    return torch.cat([state["exp_avg"].flatten() for state in optimizer["optimizer"]["state"].values()])


@pytest.mark.slow
def test_a_run_of_one_process_is_continued_by_two(config, one, tmp_path):
    options = [*OVERRIDES, f"run.folder={tmp_path}/run"]
    train(load_config(config, [*options, "train.steps=1"]))
    # The reward's argument is of this test, not of the run.
    (tmp_path / "run" / "config.yaml").write_text(
        (tmp_path / "run" / "config.yaml").read_text().replace("world: 1", "world: 2")
    )
    done = launch(2, tiny_runs.SCRIPT, "--config", config, *options, "rewards.mean.args.world=2", "--resume")
    assert done.returncode == 0, done.stderr
    for alone, both in zip(rows(one), rows(tmp_path / "run"), strict=True):
        assert numbers(both) == pytest.approx(numbers(alone), rel=1e-4)


@pytest.mark.slow
def test_a_usage_error_is_said_by_one_process_and_ends_what_the_launcher_says(config, tmp_path):
    done = launch(2, tiny_runs.SCRIPT, "--config", config, f"run.folder={tmp_path}/run", "train.batch_size=3")
    assert done.returncode != 0
    said = "error: train.batch_size=3 must be a multiple of processes × micro_batch = 2 × 1"
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [said]
    assert said in "\n".join(done.stderr.splitlines()[-3:])
    assert not (tmp_path / "run").exists()


HANGS = """
import time
import torch

class Hangs:
    def __call__(self, video, prompts):
        if video.requires_grad and torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            time.sleep({seconds})
        return video.float().mean((1, 2, 3, 4))
"""


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run(config, tmp_path):
    (tmp_path / "reward.py").write_text(HANGS.format(seconds=600))
    options = [f"run.folder={tmp_path}/run", "~rewards.mean", f"rewards.own.name={tmp_path}/reward.py:Hangs"]
    options += [*OVERRIDES, "parallel.timeout=60"]
    done = launch(2, "--shutdown-timeout", 5, tiny_runs.SCRIPT, "--config", config, *options)
    assert done.returncode != 0
    assert "LostContactError: process 0 waited for the others in vain" in done.stderr
    assert "parallel.timeout=60 seconds" in "\n".join(done.stderr.splitlines()[-3:])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_launcher_that_is_ended_leaves_no_orphans_and_a_checkpoint(config, tmp_path, launcher):
    options = ["--config", config, *OVERRIDES, "train.steps=500", "checkpoint.every=0", f"run.folder={tmp_path}/run"]
    (tmp_path / "reward.py").write_text(HANGS.format(seconds=0))
    options += ["~rewards.mean", f"rewards.own.name={tmp_path}/reward.py:Hangs"]
    if launcher == "torchrun":
        command = [*TORCHRUN, 2, "--shutdown-timeout", 300, tiny_runs.SCRIPT]
    else:
        command = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--cpu", "--num_processes", 1]
        command += [tiny_runs.SCRIPT]
    with subprocess.Popen([*map(str, [*command, *options])], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as run:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.is_file() and '"reward"' in metrics.read_text()):
            assert run.poll() is None
            time.sleep(1)
        run.send_signal(signal.SIGTERM)
        run.stderr.read()  # to its end, which is that of the last process: an orphan holds on to it
        assert run.wait() != 0
    last = rows(tmp_path / "run")[-1]["step"]
    assert f"training ended early by SIGTERM after step {last} of 500" in (tmp_path / "run/report.html").read_text()
    folder = RunFolder(tmp_path / "run")
    assert folder.checkpoints.verify(last)
    folder.expect_no_owner()

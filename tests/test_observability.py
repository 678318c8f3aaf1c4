"""What a run shows of itself: its environment, trackers, the progress bar, a trace."""

import gzip
import io
import json
from types import SimpleNamespace

import pytest
import tiny_pipelines
import tiny_runs
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from chopgrad_align.training import parallel
from chopgrad_align.training.environment import environment
from chopgrad_align.training.observers import Observers, by_key
from chopgrad_align.training.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that was resumed for one more step, traced and tracked."""
    model, folder = tmp_path_factory.mktemp("wan"), tmp_path_factory.mktemp("run")
    tiny_pipelines.wan_t2v().save_pretrained(model)
    train(tiny_runs.config(folder, model, "trackers=[tensorboard]"), profile=1)
    train(tiny_runs.config(folder, model, "trackers=[tensorboard]", "train.steps=3"), resume=True)
    return folder / "run"


def test_each_start_is_noted_with_versions_and_machine(run):
    first, second = json.loads((run / "environment.json").read_text())
    assert first["started"] <= second["started"]
    assert {"command", "host", "cpu", "python", "torch", "diffusers", "peft", "chopgrad-align"} <= first.keys()
    assert first["processes"] == "1, cpu"
    assert first["host"] in (page := (run / "report.html").read_text())
    assert f"{first['started']} → {second['started']}" in page


def test_a_package_that_is_no_repository_has_no_commit(monkeypatch, tmp_path):
    import torch

    from chopgrad_align.training import environment as module

    monkeypatch.setattr(module, "__file__", str(tmp_path / "environment.py"))
    assert "commit" not in environment(torch.device("cpu"), 1)


def test_trackers_have_config_videos_and_prompts(run):
    first = EventAccumulator(str(min((run / "chopgrad_align").glob("events*"))))
    first.Reload()
    tags = first.Tags()
    assert {"reward", "heldout/reward_mean"} <= set(tags["scalars"])
    video = first.Images("samples/000")
    assert [event.step for event in video] == [0, 2]
    image = Image.open(io.BytesIO(video[0].encoded_image_string))
    assert (image.format, image.n_frames, image.size) == ("GIF", 5, (16, 16))
    text = first.Tensors("samples/000/prompt/text_summary")[0].tensor_proto.string_val[0]
    assert text == b"a large red star"
    (saved,) = list((run / "chopgrad_align").glob("*/hparams.yml"))[:1]
    assert "train.learning_rate: 0.01" in saved.read_text()


def test_a_trace_names_the_phases_of_a_step(run):
    events = json.loads(gzip.decompress((run / "trace.json.gz").read_bytes()))["traceEvents"]
    assert {"sampling", "decoding", "reward", "backward"} <= {event.get("name") for event in events}


def test_a_config_by_key():
    tree = {"a": {"b": 1, "c": {}}, "d": [1], "e": None, "f": True}
    assert by_key(tree) == {"a.b": 1, "a.c": "{}", "d": "[1]", "e": "null", "f": True}


def test_the_bar_in_a_log_is_lines_with_time_memory_and_a_smoothed_reward(monkeypatch, capsys):
    seen = SimpleNamespace(append=lambda row: None, path=None)
    processes = SimpleNamespace(is_main=True, track=lambda row, step: None, trackers=[])
    observers = Observers(SimpleNamespace(train=SimpleNamespace(steps=3)), seen, processes)
    monkeypatch.setattr("chopgrad_align.training.observers._SECONDS_IN_A_LOG", 0.0)
    with observers.bar(0):
        for step, reward in enumerate((1.0, 2.0, float("nan")), 1):
            observers.row({"step": step, "reward": reward, "peak_memory_gib": 0.5, "skipped": step // 3})
    error = capsys.readouterr().err
    assert "\r" not in error
    last = error.splitlines()[-1]
    assert "3/3" in last
    assert "smoothed=1.5263, memory=0.5GiB, skipped=1" in last


@pytest.mark.parametrize(
    ("environ", "threads"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, None),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, None),
        ({"OMP_NUM_THREADS": "3", "ACCELERATE_MIXED_PRECISION": "no"}, 3),
        ({"OMP_NUM_THREADS": "many"}, None),
    ],
    ids=["unset", "three", "one", "accelerate", "torchrun", "accelerate-three", "no-number"],
)
def test_threads_are_those_of_the_environment(environ, threads, monkeypatch):
    monkeypatch.setattr(parallel.os, "environ", environ)
    assert parallel._threads_of_the_environment() == threads

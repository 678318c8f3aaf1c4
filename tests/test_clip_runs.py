"""Runs on clips: what is said before long work, which captions are encoded, and clips read ahead."""

import csv
import threading

import pytest
import tiny_pipelines
import tiny_runs
import torch

from chopgrad_align.common.errors import UsageError
from chopgrad_align.data.clips import Clips
from chopgrad_align.data.source import BadFile
from chopgrad_align.data.video import write_video
from chopgrad_align.training import build, trainer
from chopgrad_align.training.data import read_data
from chopgrad_align.training.models import load_objective, load_pipeline
from chopgrad_align.training.prefetch import Prefetched
from chopgrad_align.training.run import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    tiny_pipelines.wan_t2v("euler").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Six files to train on, `train/0.mp4` with the caption train 0, and two that are held out."""
    folder = tmp_path_factory.mktemp("clips")
    for part, count in (("train", 6), ("held_out", 2)):
        for i in range(count):
            coarse = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(i + count))
            write_video(folder / part / f"{i}.mp4", torch.nn.functional.interpolate(coarse, (16, 16)), 8)
        with (folder / part / "metadata.csv").open("w", newline="") as file:
            rows = [(f"{i}.mp4", f"{part} {i}") for i in range(count)]
            csv.writer(file).writerows([("file_name", "caption"), *rows])
    return folder


@pytest.fixture
def configure(model, clips, tmp_path):
    """One-step restoration with a loss in place of the reward."""
    own = [
        *(f"data.{part}={clips / part}" for part in ("train", "held_out")),
        *("data.clips={degradation: {name: downscale, factor: [2, 2]}}", "prediction.mode=one_step"),
        *("~rewards.colour", "losses={l1: {name: l1}}", "model.call.guidance_scale=1"),
    ]
    return lambda *overrides: tiny_runs.config(tmp_path, model, *own, *overrides)


def test_video_to_video(configure, model, tmp_path, monkeypatch):
    """Its call takes no number of frames: it makes as many as it is given."""
    from diffusers import WanPipeline, WanVideoToVideoPipeline

    wan = WanPipeline.from_pretrained(model)
    parts = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    WanVideoToVideoPipeline(**{name: wan.components[name] for name in parts}).save_pretrained(tmp_path / "model")
    call = ["prediction.mode=sample", "prediction.columns={video: degraded}", "model.call.strength=0.7"]
    alone = ["train.micro_batch=1", "validation.batch=1"]
    train(configure(f"model.name={tmp_path / 'model'}", *call, *alone))
    norms = [row["grad_norm"] for row in tiny_runs.rows(tmp_path / "run")]
    assert len(norms) == 2
    assert min(norms) > 0


# --- what is said before long work ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["prediction.source=degradedd"],
            r"prediction.source: .* no role 'degradedd'; did you mean 'degraded'\? .*/train",
        ),
        (["~data.clips.degradation"], r"prediction.source: the data has no role 'degraded'. .*/train has: target$"),
        (["prediction.columns={video: mask}"], r"prediction.columns.video: the data has no role 'mask'"),
    ],
)
def test_a_role_that_the_data_do_not_have_is_found_before_a_model_is_loaded(configure, monkeypatch, overrides, message):
    monkeypatch.setattr(build, "load_pipeline", lambda *args: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=message):
        train(configure(*overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prediction.columns={vidoe: degraded}"], r"WanPipeline takes no argument 'vidoe'"),
        (["model.scheduler.name=EDMEulerScheduler"], r"EDMEulerScheduler cannot sample this model, which predicts vel"),
    ],
)
def test_what_the_pipeline_cannot_do_is_found_before_rewards_are_loaded(configure, monkeypatch, overrides, message):
    monkeypatch.setattr(build, "load_objective", lambda *args: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=message):
        train(configure(*overrides))


@pytest.mark.parametrize("mode", ["mode=one_step", "mode=denoise"])
def test_a_pipeline_of_an_unknown_kind(configure, monkeypatch, mode):
    monkeypatch.setattr(build, "load_objective", lambda *args: pytest.fail("loaded"))
    monkeypatch.setattr(build, "load_pipeline", lambda *_: tiny_pipelines.animatediff())
    with pytest.raises(UsageError, match=r"AnimateDiffPipeline is not known to start from latents .* known are Wan, "):
        train(configure("prediction.mode=sample", "prediction.overlap=1", f"prediction.{mode}"))


@pytest.mark.parametrize("key", ["train.micro_batch", "validation.batch"])
def test_a_pipeline_that_takes_one_clip_a_call(configure, monkeypatch, key):
    monkeypatch.setattr(build, "load_objective", lambda *args: pytest.fail("loaded"))
    monkeypatch.setattr(build, "load_pipeline", lambda *_: tiny_pipelines.wan_vace())
    with pytest.raises(UsageError, match="WanVACEPipeline takes one clip a call"):
        train(configure("prediction.mode=sample", "train.micro_batch=1", "validation.batch=1", f"{key}=2"))


SAID = "data.held_out: {} clips are training clips too; what is measured there is not held out"


def overlap(capsys):
    """What was said, but how many clips there are."""
    return "\n".join(line for line in capsys.readouterr().out.splitlines() if "clips, " not in line)


def test_clips_that_are_not_held_out(configure, clips, capsys, tmp_path):
    read_data(configure())
    assert not overlap(capsys)
    read_data(configure(f"data.held_out={clips / 'train'}"))
    assert overlap(capsys) == SAID.format("6 of 6")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for part in ("train", "held_out"):
        (mixed / f"{part}.mp4").symlink_to(clips / part / "0.mp4")
    read_data(configure(f"data.held_out={mixed}"))
    assert overlap(capsys) == SAID.format("1 of 2")


def test_splits_of_a_data_set_that_are_not_held_out(configure, clips, capsys, tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"path": [str(clips / "train" / f"{i}.mp4") for i in range(2)]})
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "two"))
    capsys.readouterr()
    for name, said in (("one", SAID.format("2 of 2")), ("two", "")):
        own = [f"data.{part}={tmp_path / name}" for part in ("train", "held_out")]
        read_data(configure(*own, "data.clips.columns={target: path}"))
        assert overlap(capsys) == said


# --- captions ---------------------------------------------------------------------------------------------------------

HELD_OUT = {"held_out 0", "held_out 1"}


def batches_of(config):
    pipe, objective = load_pipeline(config.model), load_objective({}, torch.device("cpu"), config.losses)
    return read_data(config).batches(pipe, objective, config)


def captions(batches, steps):
    return {caption for step in steps for caption in batches.micro_batch(step, range(2)).prompts}


def test_the_captions_are_those_of_the_clips_that_are_read(configure):
    batches = batches_of(configure())
    assert set(batches.prompts(0)) == HELD_OUT
    for steps, count in ((1, 2), (2, 4), (3, 6), (9, 6)):
        assert len(batches.prompts(steps)) == len(HELD_OUT) + count
        assert set(batches.prompts(steps)) == HELD_OUT | captions(batches, range(steps))
    assert batches_of(configure("data.clips.caption=restore it")).prompts(9) == ["restore it"]


@pytest.fixture
def damage(monkeypatch):
    """Make files with these captions unreadable after they have been looked at."""
    damaged, read = set(), Clips._read

    def read_unless_damaged(self, entry, seed):
        if entry.row.caption in damaged:
            raise BadFile("corrupt", entry.row.name, "a frame is damaged")
        return read(self, entry, seed)

    monkeypatch.setattr(Clips, "_read", read_unless_damaged)
    return damaged.update


@pytest.mark.parametrize("batch", [1, 2])
def test_what_takes_the_place_of_a_damaged_clip_has_a_known_caption(configure, damage, batch):
    batches = batches_of(configure(f"train.batch_size={batch}", "run.seed=1"))
    order = [batches.micro_batch(step, range(batch)).prompts for step in range(3)]
    damage(order[1])
    for step in range(1, 3):
        read = batches.micro_batch(step, range(batch)).prompts
        assert set(read) <= set(batches.prompts(step + 1)) - set(order[1])
    assert batches.micro_batch(2, range(batch)).prompts == order[2]
    damage(order[0])
    with pytest.raises(
        UsageError, match=r"data.train: no clip up to step 1 can be read: 6 usable, .* skipped: .*corrupt"
    ):
        batches.micro_batch(0, range(batch))


def test_a_run_goes_on_past_a_damaged_clip(configure, damage, tmp_path):
    config = configure()
    damage(batches_of(config).micro_batch(1, range(1)).prompts)
    train(config)
    assert len(tiny_runs.rows(tmp_path / "run")) == 2


# --- clips read ahead -------------------------------------------------------------------------------------------------


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_results_come_in_order_and_one_is_made_ahead():
    begun, started = [], [threading.Event() for _ in range(4)]

    def square(number):
        begun.append(number)
        assert threading.current_thread() in readers()
        started[number].set()
        return number**2

    with Prefetched(square, ((i,) for i in range(4))) as squares:
        for i in range(4):
            assert next(squares) == i**2
            assert started[min(i + 1, 3)].wait(10)  # without being asked for
            assert begun == [*range(min(i + 2, 4))]
            assert len(readers()) == 1
        assert list(squares) == []
    assert not readers()


def test_an_error_is_raised_where_its_result_is_asked_for():
    def inverse(number):
        return 1 / number

    with Prefetched(inverse, [(1,), (0,), (2,)]) as inverses:
        assert next(inverses) == 1
        with pytest.raises(ZeroDivisionError):
            next(inverses)
    with pytest.raises(RuntimeError, match="mine"), Prefetched(inverse, [(0,), (1,)]):
        raise RuntimeError("mine")
    assert not readers()


class Unhurried:
    """What is asked for is made then."""

    def __init__(self, function, arguments):
        self.results = (function(*one) for one in arguments)

    def __enter__(self):
        return self.results

    def __exit__(self, *error):
        pass


def test_a_run_is_the_same_when_clips_are_read_ahead(configure, tmp_path, monkeypatch):
    options = ["train.steps=3", "data.clips.mask={name: box}", "lora.dropout=0.1", "validation.every=1"]
    train(configure(*options, f"run.folder={tmp_path}/ahead"))
    assert not readers()
    monkeypatch.setattr(trainer, "Prefetched", Unhurried)
    train(configure(*options, f"run.folder={tmp_path}/then"))
    ahead, then = (
        [tiny_runs.rows(tmp_path / name, key) for key in ("reward", "heldout/l1")] for name in ("ahead", "then")
    )
    assert ahead == then
    saved = [tiny_runs.saved_lora(tmp_path / name) for name in ("ahead", "then")]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0] | saved[1])


def test_a_clip_that_cannot_be_read_stops_the_run(configure, damage, tmp_path):
    config = configure("data.clips.on_bad_file=error", "train.steps=3", "validation.every=1")
    damage(batches_of(config).micro_batch(1, range(1)).prompts)
    with pytest.raises(UsageError, match=r"bad file .*corrupt: a frame is damaged"):
        train(config)
    assert not readers()
    assert [row["step"] for row in tiny_runs.rows(tmp_path / "run")] == [1]

"""Rows that bring arguments of a pipeline's call: what a column means, what is refused, and how rows are batched."""

import json

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import tiny_runs
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from chopgrad_align.common.errors import UsageError
from chopgrad_align.data.buckets import Bucket
from chopgrad_align.data.prompts import read_conditions
from chopgrad_align.data.video import read_video, write_video
from chopgrad_align.objective.objective import Objective
from chopgrad_align.training.batches import PromptBatches
from chopgrad_align.training.bound_conditions import bind, check_stacks
from chopgrad_align.training.run import train


@pytest.fixture
def folder(tmp_path):
    """A video of 9 frames and its first 5, each 16x32, and pictures of 16x32."""
    coarse = torch.rand(9, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    write_video(tmp_path / "nine.mp4", torch.nn.functional.interpolate(coarse, (16, 32)), 8)
    for i in range(2):
        tiny_pipelines.picture(i).resize((32, 16)).save(tmp_path / f"{i}.png")
    return tmp_path


def rows_of(folder, *rows):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return read_conditions(folder / "rows.jsonl")


def without_weights(name):
    """A pipeline of a class, of which only the call's signature can be read."""
    return object.__new__(getattr(diffusers, name))


def inputs(folder, pipeline, call=None, buckets=(), **row):
    pipe = without_weights(pipeline)
    (bound,) = bind(pipe, rows_of(folder, {"prompt": "a fox", **row}), buckets=buckets).rows
    return bound.inputs(pipe, call or {})


def video(frames):
    return torch.stack([pil_to_tensor(frame) / 255 for frame in frames])


def as_read(folder, count, width=32):
    """The first frames of the video, of which the middle columns are seen."""
    frames = read_video(folder / "nine.mp4")[0][:count, :, :, (32 - width) // 2 : (32 + width) // 2]
    return (frames * 255).round() / 255


WIDE = {"height": 16, "width": 32, "num_frames": 5}


# --- what a column means ----------------------------------------------------------------------------------------------


def test_first_and_last_frame(folder):
    given = inputs(folder, "WanImageToVideoPipeline", WIDE, image="0.png", last_image="1.png")
    for name, file in (("image", "0.png"), ("last_image", "1.png")):
        assert (np.asarray(given[name]) == np.asarray(Image.open(folder / file))).all()


def test_video_mask_and_references(folder):
    given = inputs(
        folder,
        "WanVACEPipeline",
        WIDE,
        video="nine.mp4",
        mask="0.png",
        reference_images=["0.png", "1.png"],
        conditioning_scale=0.5,
    )
    assert torch.equal(video(given["video"]), as_read(folder, 5))
    assert torch.equal(
        video(given["mask"]), video([Image.open(folder / "0.png")] * 5)
    )  # a still mask is of every frame
    assert [image.size for image in given["reference_images"]] == [(32, 16)] * 2
    assert given["conditioning_scale"] == 0.5
    one = inputs(folder, "WanVACEPipeline", WIDE, reference_images="0.png")["reference_images"]
    assert [image.size for image in one] == [(32, 16)]


def test_pose_and_face(folder):
    size = {"height": 16, "width": 16}
    given = inputs(
        folder, "WanAnimatePipeline", size, image="0.png", pose_video="nine.mp4", face_video="nine.mp4", mode="replace"
    )
    assert torch.equal(video(given["pose_video"]), as_read(folder, 9, 16))
    assert torch.equal(video(given["face_video"]), as_read(folder, 9))  # of another part of the picture: not cut
    assert given["mode"] == "replace"


@pytest.mark.parametrize(
    ("pipeline", "column"),
    [("CogVideoXFunControlPipeline", "control_video"), ("Cosmos2_5_TransferPipeline", "controls")],
    ids=["cogvideox", "cosmos"],
)
def test_control(folder, pipeline, column):
    given = inputs(folder, pipeline, {"height": 16, "width": 32}, **{column: "nine.mp4"})
    assert torch.equal(video(given[column]), as_read(folder, 9))


def test_conditions_at_frames(folder):
    given = inputs(
        folder, "LTXConditionPipeline", WIDE, image=["0.png", "1.png"], frame_index=[0, 4], strength=[1.0, 0.5]
    )
    assert [image.size for image in given["image"]] == [(32, 16)] * 2
    assert (given["frame_index"], given["strength"]) == ([0, 4], [1.0, 0.5])
    (frames,) = inputs(folder, "LTXConditionPipeline", WIDE, video="nine.mp4")["video"]  # one of several
    assert torch.equal(video(frames), as_read(folder, 5))
    (condition,) = inputs(
        folder, "LTX2ConditionPipeline", WIDE, conditions=[{"frames": "nine.mp4", "index": 4, "strength": 0.5}]
    )["conditions"]
    assert torch.equal(video(condition.frames), as_read(folder, 5))
    assert (condition.index, condition.strength) == (4, 0.5)


def test_camera(folder):
    path = np.arange(32, dtype=np.float32).reshape(2, 4, 4)
    np.save(folder / "path.npy", path)
    given = inputs(folder, "SanaWMPipeline", image="0.png", c2w="path.npy", intrinsics=[1, 2, 3, 4])
    assert (given["c2w"] == path).all()
    assert given["intrinsics"] == [1, 2, 3, 4]
    (tensor,) = inputs(folder, "ConsisIDPipeline", image="0.png", id_vit_hidden=["path.npy"])["id_vit_hidden"]
    assert torch.equal(tensor, torch.from_numpy(path))


def test_a_table_of_text_says_the_same(folder):
    columns = "prompt,video,reference_images,num_frames,guidance_scale,negative_prompt,seed,weight"
    (folder / "p.csv").write_text(f'{columns}\na fox,nine.mp4,"[""0.png"", ""1.png""]",5,2.5,grey,7,2\na cat,,,,,,,\n')
    (condition, other), pipe = read_conditions(folder / "p.csv"), without_weights("WanVACEPipeline")
    assert (condition.negative_prompt, condition.seed, condition.weight) == ("grey", 7, 2.0)
    bound, bare = bind(pipe, [condition, other]).rows
    assert bound.constants == {"num_frames": 5, "guidance_scale": 2.5}
    given = bound.inputs(pipe, {"height": 16, "width": 32})
    assert torch.equal(video(given["video"]), as_read(folder, 5))
    assert len(given["reference_images"]) == 2
    assert bare.inputs(pipe, {}) == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"vidoe": "nine.mp4"}, r"WanVACEPipeline takes no argument 'vidoe'; did you mean 'video'\? .* data.ignore"),
        ({"generator": 3}, r"a row cannot bring 'generator'"),
        ({"prompt_embeds": "a.npy"}, r"a row cannot bring 'prompt_embeds'"),
        (
            {"guidance_scale": "much"},
            r"line 1: column 'guidance_scale': expected a value as JSON writes it, got 'much'",
        ),
        ({"guidance_scale": True}, r"expected a number, got True"),
        ({"num_frames": 5.5}, r"column 'num_frames': expected int, got 5.5"),
        ({"video": 3}, r"column 'video': expected a path, or a list of paths, got 3"),
        ({"video": "none.mp4"}, r"column 'video': bad file .*none\.mp4 \(missing: no such file"),
        ({"video": "rows.jsonl"}, r"column 'video': bad file .*rows\.jsonl \(unreadable"),
        ({"seed": -1}, r"line 1: expected a whole number from 0 as `seed`, got -1"),
    ],
    ids=["nearly", "generator", "embeds", "word", "boolean", "half", "number", "missing", "unreadable", "seed"],
)
def test_a_cell_that_cannot_work(folder, row, message):
    with pytest.raises(UsageError, match=message):
        inputs(folder, "WanVACEPipeline", **row)


def test_columns_that_are_not_read(folder):
    rows = rows_of(folder, {"prompt": "a", "id": 3, "source": "web", "videos": 2})
    pipe = without_weights("WanVACEPipeline")
    binding = bind(pipe, rows, ignored=["videos"])
    assert binding.unread == ["id", "source"]
    assert binding.arguments == []
    with pytest.raises(UsageError, match=r"line 1: WanVACEPipeline takes nothing that is in it"):
        bind(pipe, rows_of(folder, {"id": 3}))
    with pytest.raises(UsageError, match=r"WanPipeline takes no images; leave the column out"):
        bind(without_weights("WanPipeline"), rows_of(folder, {"image": "0.png"}))


# --- batches ----------------------------------------------------------------------------------------------------------


def batches(pipe, rows, buckets=(), size=2, **options):
    bound = bind(pipe, rows, buckets=buckets).rows
    return PromptBatches(pipe, Objective(), bound, bound, size, 7, **options)


SHAPES = [Bucket(5, 16, 16), Bucket(9, 16, 32)]


def test_prompts_come_in_every_bucket_and_a_batch_in_one(folder):
    made, seen = batches(without_weights("WanPipeline"), rows_of(folder, *({"prompt": p} for p in "abcd")), SHAPES), []
    for step in range(4):  # two of each bucket
        batch = made.micro_batch(step, range(2))
        shape = tuple(batch.inputs[name] for name in ("num_frames", "height", "width"))
        seen += [(prompt, shape) for prompt in batch.prompts]
        assert set(batch.prompts) <= set(made.prompts(step + 1))
    assert sorted(seen) == sorted((p, (b.frames, b.height, b.width)) for p in "abcd" for b in SHAPES)


def test_an_image_has_the_bucket_of_its_shape(folder):
    pipe = without_weights("WanImageToVideoPipeline")
    Image.new("RGB", (40, 40)).save(folder / "square.png")
    rows = bind(pipe, rows_of(folder, {"image": "0.png"}, {"image": "square.png"}), buckets=SHAPES).rows
    assert [row.bucket for row in rows] == [SHAPES[1], SHAPES[0]]
    own = bind(pipe, rows_of(folder, {"image": "0.png", "num_frames": 13}), buckets=SHAPES).rows
    assert [row.constants for row in own] == [{"num_frames": 13}]


def test_a_video_has_a_bucket_that_it_is_long_enough_for(folder):
    pipe, longer = without_weights("WanVACEPipeline"), Bucket(13, 16, 32)
    (row,) = bind(pipe, rows_of(folder, {"video": "nine.mp4"}), buckets=[*SHAPES, longer]).rows
    assert row.bucket == SHAPES[1]
    assert torch.equal(video(row.inputs(pipe, {})["video"]), as_read(folder, 9))


def test_a_seed_of_its_own(folder):
    made = batches(
        without_weights("WanPipeline"), rows_of(folder, {"prompt": "a", "seed": 5}, {"prompt": "b"}), seeds=2
    )
    for step in range(3):
        batch = made.micro_batch(step, range(2))
        seeds = dict(zip(batch.prompts, batch.seeds, strict=True))
        assert seeds["a"] == 5
        assert seeds["b"] > 5
        assert [generator.initial_seed() for generator in batch.inputs["generator"]] == list(batch.seeds)
    held_out = [made.held_out(range(i, i + 1)) for i in range(8)]
    assert [batch.seeds[0] for batch in held_out if batch.prompts == ["a"]] == [5, 6, 7, 8]  # no two alike


def test_rows_that_cannot_be_in_one_call(folder):
    pipe = without_weights("WanVACEPipeline")
    rows = bind(pipe, rows_of(folder, {"prompt": "a", "guidance_scale": 2}, {"prompt": "b"})).rows
    with pytest.raises(UsageError, match=r"the rows differ in 'guidance_scale', which a call has once: set train"):
        check_stacks(rows)
    with pytest.raises(UsageError, match=r"one image a call"):
        check_stacks(bind(pipe, rows_of(folder, {"video": "nine.mp4"})).rows)
    alike = bind(pipe, rows_of(folder, *({"prompt": p, "guidance_scale": 2, "num_frames": 5} for p in "ab"))).rows
    check_stacks(alike)
    batch = PromptBatches(pipe, Objective(), alike, alike, 2, 7).micro_batch(0, range(2))
    assert (batch.inputs["guidance_scale"], len(batch.inputs["prompt"])) == (2.0, 2)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    def saved(name, *args):
        folder = tmp_path_factory.mktemp(name)
        getattr(tiny_pipelines, name)(*args).save_pretrained(folder)
        return folder

    return saved


def test_a_run_on_rows_with_videos_and_numbers_of_their_own(folder, models, capsys):
    rows_of(
        folder,
        {"prompt": "a", "video": "nine.mp4", "mask": "0.png", "reference_images": ["0.png"], "seed": 3, "id": 1},
        {"prompt": "b", "video": "nine.mp4", "guidance_scale": 1.0, "num_frames": 9, "negative_prompt": "grey"},
    )
    data = [f"data.{part}={folder}/rows.jsonl" for part in ("train", "held_out")]
    config = tiny_runs.config(folder, models("wan_vace"), *data, "train.steps=1", "train.micro_batch=1")
    train(config)
    said = capsys.readouterr().out
    assert "2 rows, 2 with a prompt" in said
    assert "columns that are not read: id" in said
    frames = {len(read_video(path)[0]) for path in (folder / "run" / "samples").rglob("*.mp4")}
    assert frames
    (row,) = tiny_runs.rows(folder / "run")
    assert row["grad_norm"] > 0


def test_a_run_in_several_buckets(folder, models):
    overrides = ["data.buckets=[[5,16,16],[9,16,32]]", "train.steps=2", "~model.call.num_frames", "validation.videos=2"]
    train(tiny_runs.config(folder, models("wan_t2v", "euler"), *overrides))
    shapes = {tuple(read_video(path)[0].shape) for path in (folder / "run" / "samples").rglob("*.mp4")}
    assert shapes == {(5, 3, 16, 16), (9, 3, 16, 32)}
    assert all(row["grad_norm"] > 0 for row in tiny_runs.rows(folder / "run"))


def test_a_wrong_shape_of_a_row_is_found_before_rewards_are_loaded(folder, models, monkeypatch):
    from chopgrad_align.training import build

    monkeypatch.setattr(build, "load_objective", lambda *args: pytest.fail("loaded"))
    rows_of(folder, {"prompt": "a", "num_frames": 6})
    data = [f"data.{part}={folder}/rows.jsonl" for part in ("train", "held_out")]
    with pytest.raises(UsageError, match=r"num_frames=6"):
        train(tiny_runs.config(folder, models("wan_t2v", "euler"), *data))


def test_a_reward_on_clips_without_a_target(folder, models):
    (folder / "clips").mkdir()
    (folder / "nine.mp4").rename(folder / "clips/nine.mp4")
    (folder / "clips/metadata.csv").write_text("control,text\nnine.mp4,a fox\n")
    own = [f"data.{part}={folder}/clips" for part in ("train", "held_out")]
    own += ["data.clips={columns: {control: control, caption: text}}", "prediction.columns={video: control}"]
    config = tiny_runs.config(folder, models("wan_vace"), *own, "train.steps=1", "train.micro_batch=1")
    train(config)
    assert tiny_runs.rows(folder / "run")[0]["grad_norm"] > 0
    with pytest.raises(UsageError, match=r"losses.l1 compares with a target, and .*/clips has none"):
        train(tiny_runs.config(folder, models("wan_vace"), *own, "losses={l1: {name: l1}}", f"run.folder={folder}/b"))

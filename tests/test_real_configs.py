"""Each config of a published model, as it is, on a tiny model of the same classes and with tiny reward checkpoints."""

import functools
import json
import math
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import tiny_pipelines
import tiny_rewards
import torch
from every_pipeline import ENTRIES
from safetensors.torch import load_file

from chopgrad_align.common.errors import UsageError
from chopgrad_align.training.config import Model
from chopgrad_align.training.config_file import load_config
from chopgrad_align.training.lora import load_lora
from chopgrad_align.training.models import check_model, read_pipeline
from chopgrad_align.training.run import train

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = {
    "wan2.1_t2v_1.3b_hps": "WanPipeline",
    "wan2.1_t2v_14b_hps": "WanPipeline",
    "wan2.1_t2v_14b_4_steps_hps": "WanPipeline",
    "wan2.1_i2v_14b_aesthetic": "WanImageToVideoPipeline",
    "wan2.2_t2v_a14b_hps": "WanPipeline/two_stages",
    "wan2.2_i2v_a14b_aesthetic": "WanImageToVideoPipeline/two_stages",
    "wan2.2_ti2v_5b_hps": "WanPipeline",
    "skyreels_v2_t2v_14b_hps": "SkyReelsV2Pipeline",
    "cogvideox_2b_aesthetic_hps": "CogVideoXPipeline",
    "cogvideox_5b_hps": "CogVideoXPipeline",
    "cogvideox_5b_i2v_aesthetic": "CogVideoXImageToVideoPipeline",
    "cogvideox1.5_5b_hps": "CogVideoXPipeline/1.5",
    "ltx_video_hps": "LTXPipeline",
    "ltx_video_13b_8_steps_hps": "LTXConditionPipeline",
    "ltx2_hps": "LTX2Pipeline",
    "ltx2_8_steps_hps": "LTX2Pipeline",
    "hunyuan_video_hps": "HunyuanVideoPipeline",
    "hunyuan_video1.5_hps": "HunyuanVideo15Pipeline",
    "mochi_hps": "MochiPipeline",
    "cosmos2.5_2b_hps": "Cosmos2_5_PredictBasePipeline",
    "animatediff_hps": "AnimateDiffPipeline",
    "svd_xt_aesthetic": "StableVideoDiffusionPipeline",
}
"""The stand-in of the model among the tiny pipelines of every class."""
QUICK = {
    "wan2.1_t2v_1.3b_hps",
    "wan2.1_t2v_14b_4_steps_hps",
    "wan2.1_i2v_14b_aesthetic",
    "wan2.2_t2v_a14b_hps",
    "cogvideox_2b_aesthetic_hps",
    "animatediff_hps",
    "svd_xt_aesthetic",
}
"""One of each kind; the others take the slow tier."""
GRIDS = {
    "wan": (4, 16), "wan2.2_ti2v": (4, 32), "skyreels": (4, 16), "cogvideox": (8, 16), "cogvideox1.5": (16, 16),
    "ltx": (8, 32), "hunyuan": (4, 16), "mochi": (6, 16), "cosmos": (4, 16), "animatediff": (1, 8), "svd": (1, 64),
}  # fmt: skip
"""Of published models, by how their configs begin: frames are one more than a multiple, sides are a multiple."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return tiny_rewards.make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def test_every_config_of_a_published_model_is_tested():
    configs = {path.stem: load_config(path) for path in CONFIGS.glob("*.yaml")}
    embedded = str(files("chopgrad_align") / "embedded" / "pipeline")
    prompts = {name for name, c in configs.items() if c.data.clips is None and c.model.name != embedded}
    assert prompts == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_the_published_model_makes_the_configs_size_exactly(name):
    call = load_config(CONFIGS / f"{name}.yaml").model.call
    frames, pixels = GRIDS[max((known for known in GRIDS if name.startswith(known)), key=len)]
    assert (call["num_frames"] - 1) % frames == call["height"] % pixels == call["width"] % pixels == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pipeline": "AnimateDifPipeline"},
            "diffusers has no 'AnimateDifPipeline'; did you mean 'AnimateDiffPipeline'",
        ),
        (
            {"components": {"motion_adapter": "nowhere"}},
            r"model\.components\.motion_adapter: there is no folder nowhere",
        ),
    ],
    ids=["pipeline", "component"],
)
def test_what_a_model_is_made_of_is_looked_at_first(settings, message):
    with pytest.raises(UsageError, match=message):
        check_model(Model(name="owner/name", **settings))


def stand_in(name):
    """The tiny pipeline for a config, and the call that it can do."""
    cls, _, mode = MODELS[name].partition("/")
    if (cls, mode) == ("WanImageToVideoPipeline", "two_stages"):
        return replace(ENTRIES[cls], make=functools.partial(tiny_pipelines.wan_i2v, two_stage=True))
    return ENTRIES[MODELS[name]]


def save_model(name, folder):
    """Save the stand-in as the published model is: of AnimateDiff the image model and the motion modules apart."""
    pipe = stand_in(name).make()
    if name != "animatediff_hps":
        pipe.save_pretrained(folder / "model")
        return []
    from diffusers import DDIMScheduler, MotionAdapter, StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        sample_size=8,
    )
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    parts = (pipe.vae, pipe.text_encoder, pipe.tokenizer, unet, scheduler, None, None)
    StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(folder / "model")
    adapter = MotionAdapter(
        block_out_channels=(16, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    adapter.save_pretrained(folder / "adapter")
    return [f"model.components.motion_adapter={folder / 'adapter'}"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MODELS]
)
@pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported")  # of Mochi's pipeline
def test_two_steps(name, checkpoints, tmp_path):
    overrides = save_model(name, tmp_path)
    # Wan's transformer tells tokens of the image from those of the text by their number, which is 512 there.
    own = ("guidance_scale", *(["max_sequence_length"] if "i2v_14b" in name else []))
    size = {key: value for key, value in stand_in(name).call.items() if key not in own}
    run = tmp_path / "run"
    asked = load_config(CONFIGS / f"{name}.yaml")
    overrides += [
        f"run.folder={run}",
        f"model.name={tmp_path / 'model'}",
        *(f"model.call.{key}={json.dumps(value)}" for key, value in size.items()),
        "model.call.num_inference_steps=3",
        "train.steps=2",
        "train.batch_size=2",
        "validation.pairs=2",
        "validation.videos=1",
        *(f"~model.loras.{key}" for key in asked.model.loras),  # which others have the weights of
        *(f"~model.{key}" for key in ("variant", "revision") if getattr(asked.model, key)),
    ]
    for key, reward in asked.rewards.items():
        local = {
            "aesthetic": {"clip": checkpoints / "vit", "head": checkpoints / "head.pth"},
            "hps_v2": {"checkpoint": checkpoints / "hps", "model": tiny_rewards.ARCHITECTURE},
        }[reward.name]
        overrides += [f"rewards.{key}.args.{argument}={value}" for argument, value in local.items()]
    if asked.data.train.startswith("data/"):
        overrides += first_frames(tmp_path, with_prompts=name != "svd_xt_aesthetic")

    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    assert (config.lora, config.gradient) == (asked.lora, asked.gradient)
    assert (config.model.dtype, config.model.scheduler) == ("bfloat16", asked.model.scheduler)
    result = train(config)

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
    for row in rows[1:3]:
        assert row["skipped"] == 0
        assert row["grad_norm"] > 0
        total = sum(reward.weight * row[f"{key}/score"] for key, reward in config.rewards.items())
        assert row["reward"] == pytest.approx(total, rel=1e-5)
    held = json.loads((run / "heldout.json").read_text())
    assert len(held["before"]) == len(held["after"]) == 2
    assert math.isfinite(result.gain)
    assert (run / "report.html").stat().st_size > 1000
    assert (run / "samples" / "after" / "000.mp4").is_file()

    first, last = (load_file(run / "checkpoints" / f"step-{n:06d}" / "lora.safetensors") for n in (0, 2))
    factors = [key for key in last if "lora_B" in key]
    assert factors
    assert not any(first[key].any() for key in factors)  # the base model, to begin with
    # What looks for the one of several tokens that are nearly alike has no gradient in bfloat16.
    assert [key for key in factors if not last[key].any() and not re.search(r"_k|attn2\.to_q", key)] == []
    assert all(value.dtype == torch.float32 for value in last.values())

    # The published weights are in one's hands by a plain pipeline.
    model, whole = config.model, {"default": "float32"}
    plain = read_pipeline(model.name, "model.name", whole, pipeline=model.pipeline, components=model.components)
    load_lora(plain, run / "lora")
    loaded = {
        f"{component}.{key.replace('.default_0', '')}": value
        for component in ("transformer", "transformer_2", "unet")
        if plain.components.get(component) is not None
        for key, value in plain.components[component].state_dict().items()
        if "lora_B" in key
    }
    assert loaded.keys() == set(factors)
    for key, value in loaded.items():
        assert torch.equal(value, last[key])


def first_frames(folder, with_prompts):
    """The two files that the user brings, as the config's header describes them."""
    overrides = []
    for split, seeds in (("train", (0, 1, 2)), ("held_out", (3, 4))):
        lines = ["image,prompt" if with_prompts else "image"]
        for seed in seeds:
            tiny_pipelines.picture(seed, 40).save(folder / f"{seed}.png")
            lines.append(f"{seed}.png" + (',"a red circle, moving"' if with_prompts else ""))
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
        overrides.append(f"data.{split}={folder / split}.csv")
    return overrides

"""Each config of a published model, as it is, on a tiny model of the same classes and with tiny reward checkpoints."""

import json
import math
from importlib.resources import files
from pathlib import Path

import pytest
import tiny_pipelines
import tiny_rewards
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from chopgrad_align.training.config_file import load_config
from chopgrad_align.training.lora import load_lora
from chopgrad_align.training.run import train

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = {
    "wan2.1_t2v_1.3b_hps": ("wan_t2v", {"num_frames": 5, "height": 16, "width": 32}),
    "wan2.1_i2v_14b_aesthetic": ("wan_i2v", {"num_frames": 5, "height": 16, "width": 32}),
    "cogvideox_2b_aesthetic_hps": ("cogvideox", {"num_frames": 9, "height": 16, "width": 24}),
    "svd_xt_aesthetic": ("svd", {"num_frames": 4, "height": 16, "width": 32, "decode_chunk_size": 2}),
}
"""The stand-in of the model, and the least size that its pipeline makes."""
GRIDS = {"wan_t2v": (4, 16), "wan_i2v": (4, 16), "cogvideox": (8, 16), "svd": (1, 64)}
"""Of the published model: frames are one more than a multiple, sides are a multiple."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return tiny_rewards.make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def test_every_config_of_a_published_model_is_tested():
    configs = {path.stem: load_config(path) for path in CONFIGS.rglob("*.yaml")}
    embedded = str(files("chopgrad_align") / "embedded" / "pipeline")
    prompts = {name for name, c in configs.items() if c.data.clips is None and c.model.name != embedded}
    assert prompts == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_the_published_model_makes_the_configs_size_exactly(name):
    call = load_config(CONFIGS / f"{name}.yaml").model.call
    frames, pixels = GRIDS[MODELS[name][0]]
    assert (call["num_frames"] - 1) % frames == call["height"] % pixels == call["width"] % pixels == 0


@pytest.mark.parametrize("name", MODELS)
def test_two_steps(name, checkpoints, tmp_path):
    model, size = MODELS[name]
    pipe = getattr(tiny_pipelines, model)()
    pipe.save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    overrides = [
        f"run.folder={run}",
        f"model.name={tmp_path / 'model'}",
        *(f"model.call.{key}={value}" for key, value in size.items()),
        "model.call.num_inference_steps=3",
        "train.steps=2",
        "train.batch_size=2",
        "validation.pairs=2",
        "validation.videos=1",
    ]
    asked = load_config(CONFIGS / f"{name}.yaml")
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
    assert all(last[key].any() for key in factors)
    assert all(value.dtype == torch.float32 for value in last.values())

    # The published weights are in one's hands by a plain pipeline.
    plain = DiffusionPipeline.from_pretrained(tmp_path / "model")
    load_lora(plain, run / "lora")
    denoiser = plain.components.get("transformer") or plain.components["unet"]
    loaded = {key: value for key, value in denoiser.state_dict().items() if "lora_B" in key}
    assert len(loaded) == len(factors)
    component = "transformer" if "transformer" in plain.components else "unet"
    for key, value in loaded.items():
        assert torch.equal(value, last[f"{component}.{key.replace('.default_0', '').replace('.default', '')}"])


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

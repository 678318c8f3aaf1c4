"""Stage `export`: a diffusers folder, the folders of the two rewards and the prompt files, float16 safetensors."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chopgrad_align.data import procedural

from .clips import caption_tokenizer
from .denoiser import CALL, make_pipeline
from .latents import load_latents
from .loop import trained
from .reward import REWARD_MEAN, REWARD_STD, make_reward
from .video_reward import make_video_reward

EMBEDDED = Path(__file__).parents[2] / "chopgrad_align" / "embedded"


def export(work: Path, _: int) -> None:
    """Write all of it; weights in float16."""
    export_pipeline(work)
    export_reward(work)
    export_video_reward(work)
    export_prompts()


def export_pipeline(work: Path) -> None:
    latents = load_latents(work).float()
    pipe = make_pipeline(work, latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)))
    trained(work, "finer", pipe.transformer, "denoiser")
    trained(work, "finer", pipe.text_encoder, "text_encoder")
    folder = EMBEDDED / "pipeline"
    pipe.to(torch.float16).save_pretrained(folder)
    save_tokenizer(pipe.tokenizer, folder / "tokenizer")
    (folder / "call_defaults.json").write_text(json.dumps(CALL, indent=2) + "\n")


def export_reward(work: Path) -> None:
    tokenizer = caption_tokenizer()
    reward, config = make_reward(tokenizer)
    preprocess = {"mean": REWARD_MEAN, "std": REWARD_STD, "interpolation": "bicubic", "resize_mode": "squash"}
    fields = {"model_cfg": config, "preprocess_cfg": preprocess}
    folder = EMBEDDED / "reward"
    save_model(trained(work, "reward", reward), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    save_tokenizer(tokenizer, folder)


def export_video_reward(work: Path) -> None:
    tokenizer = caption_tokenizer()
    reward, config = make_video_reward(tokenizer)
    folder = EMBEDDED / "video_reward"
    save_model(trained(work, "video_reward", reward), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tokenizer(tokenizer, folder)


def export_prompts() -> None:
    rng = random.Random("prompts")
    for name, count, held_out in (("prompts_train.txt", 512, False), ("prompts_held_out.txt", 64, True)):
        captions = {procedural.random_scene(rng, held_out).caption: None for _ in range(2 * count)}
        (EMBEDDED / name).write_text("\n".join(list(captions)[:count]) + "\n")


def save_model(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, path)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    fields = json.loads(config.read_text())
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of transformers knows
    config.write_text(json.dumps(fields, indent=2) + "\n")

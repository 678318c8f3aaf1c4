"""Stage `export`: a diffusers folder, an open_clip folder and the prompt files, float16 safetensors."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from chopgrad_align.data import procedural

from .clips import caption_tokenizer
from .denoiser import CALL, make_pipeline
from .latents import load_latents
from .loop import trained
from .reward import REWARD_MEAN, REWARD_STD, make_reward

EMBEDDED = Path(__file__).parents[2] / "chopgrad_align" / "embedded"


def export(work: Path, _: int) -> None:
    """Write the diffusers folder, the open_clip folder and the prompt files, in float16."""
    from safetensors.torch import save_file

    latents = load_latents(work).float()
    pipe = make_pipeline(work, latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)))
    trained(work, "finer", pipe.transformer, "denoiser")
    trained(work, "finer", pipe.text_encoder, "text_encoder")
    folder = EMBEDDED / "pipeline"
    pipe.to(torch.float16).save_pretrained(folder)
    save_tokenizer(pipe.tokenizer, folder / "tokenizer")
    (folder / "call_defaults.json").write_text(json.dumps(CALL, indent=2) + "\n")

    tokenizer = caption_tokenizer()
    reward, config = make_reward(tokenizer)
    trained(work, "reward", reward)
    folder = EMBEDDED / "reward"
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": REWARD_MEAN, "std": REWARD_STD, "interpolation": "bicubic", "resize_mode": "squash"}
    fields = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    state = {name: value.half().contiguous() for name, value in reward.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    save_tokenizer(tokenizer, folder)

    rng = random.Random("prompts")
    for name, count, held_out in (("prompts_train.txt", 512, False), ("prompts_held_out.txt", 64, True)):
        captions = {procedural.random_scene(rng, held_out).caption: None for _ in range(2 * count)}
        (EMBEDDED / name).write_text("\n".join(list(captions)[:count]) + "\n")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    fields = json.loads(config.read_text())
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of transformers knows
    config.write_text(json.dumps(fields, indent=2) + "\n")

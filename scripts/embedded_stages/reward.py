"""Stage `reward`: a small open_clip model, contrastive, on single frames."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chopgrad_align.data import procedural

from .clips import FRAMES, SIZE, caption_tokenizer
from .loop import train

REWARD_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 24, "width": 128, "heads": 4, "layers": 2, "hf_tokenizer_name": "embedded"},
}
REWARD_MEAN, REWARD_STD = [0.5] * 3, [0.5] * 3


def make_reward(tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    from open_clip.model import CLIP

    torch.manual_seed(1)
    config = copy.deepcopy(REWARD_CONFIG)
    config["text_cfg"]["vocab_size"] = len(tokenizer)
    return CLIP(**config), config


def reward_batch(step: int, size: int) -> tuple[Tensor, list[str]]:
    """One frame each of `size` scenes, degraded at random: a reward that has seen only clean renderings is blind to
    what a generator does, and its gradient is noise there."""
    rng = random.Random(step)
    frames, captions = [], []
    for i in range(size):
        scene = procedural.random_scene(rng)
        at = rng.randrange(FRAMES)
        frame = procedural.render(scene, seed=step * size + i, frames=FRAMES, size=SIZE, only=slice(at, at + 1))[:, 0]
        if rng.random() < 0.6:
            blurred = F.avg_pool2d(frame[None], 3, 1, 1, count_include_pad=False)[0]
            frame = torch.lerp(frame, blurred, rng.random())
        if rng.random() < 0.5:
            frame = frame + 0.12 * rng.random() * torch.randn_like(frame)
        if rng.random() < 0.5:
            frame = (frame - 0.5) * rng.uniform(0.8, 1.1) + 0.5 + rng.uniform(-0.06, 0.06)
        frames.append(frame.clamp(0, 1))
        captions.append(scene.caption)
    return torch.stack(frames), captions


def train_reward(work: Path, steps: int) -> None:
    tokenizer = caption_tokenizer()
    model, _ = make_reward(tokenizer)
    model.train()

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        frames, captions = reward_batch(step, 128)
        text = tokenizer(captions, padding="max_length", max_length=24, return_tensors="pt").input_ids
        with torch.autocast("cpu", torch.bfloat16):
            image, words = model.encode_image((frames - 0.5) / 0.5), model.encode_text(text)
        image, words = F.normalize(image.float(), dim=-1), F.normalize(words.float(), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * image @ words.T
        target = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        accuracy = (logits.argmax(1) == target).float().mean().item()
        return loss, {"accuracy": accuracy, "scale": model.logit_scale.exp().item()}

    train("reward", work, {"reward": model}, steps, 0.01, loss_of_step)

"""Stage `video_reward`: a small model of whole videos and their captions, contrastive, that must tell motions apart."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chopgrad_align.data import procedural

from .clips import FRAMES, SIZE, caption_tokenizer
from .loop import train

TEXT_LENGTH = 24
CONFIG: dict[str, Any] = {"size": SIZE, "widths": [16, 32, 64, 96], "points": 24, "width": 64, "length": TEXT_LENGTH}
WORDS = {
    "colour": list(procedural.COLOURS),
    "shape": list(procedural.SHAPES),
    "size": list(procedural.SIZES),
    "texture": list(procedural.TEXTURES),
    "motion": list(procedural.MOTIONS),
    "background": list(procedural.BACKGROUNDS),
}

CLEAN, LOST = 0.95, 0.4  # similarity of a clip to its caption, and what of it the worst damage takes away
MOST_DAMAGE = 0.1  # root mean square
_HARD = ("motion", "shape", "texture")


def make_video_reward(tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    from chopgrad_rewards.video_text import VideoTextModel

    torch.manual_seed(3)
    config = CONFIG | {"vocabulary": len(tokenizer)}
    return VideoTextModel(**config), config


def neighbours(scene: procedural.Scene, rng: random.Random) -> list[procedural.Scene]:
    """Scenes that differ in one word: all other motions, shapes and textures, two others of each kind else; none that
    is held out."""
    others = []
    for kind, words in WORDS.items():
        different = [word for word in words if word != getattr(scene, kind)]
        chosen = different if kind in _HARD else rng.sample(different, min(2, len(different)))
        others += [replace(scene, **{kind: word}) for word in chosen]
    return [other for other in others if not other.held_out]


def degraded(clip: Tensor, rng: random.Random) -> tuple[Tensor, float]:
    """A clip `(3, F, H, W)` as a generator may make it: slow, blurred in space and time, noisy, of another contrast.

    Returns:
        The clip, and its damage in [0, 1]: all but the contrast's.
    """
    whole = clip
    if rng.random() < 0.2:
        frames = clip.shape[1]
        clip = clip[:, ((torch.arange(frames) - frames // 2) * rng.uniform(0.2, 1)).round().int() + frames // 2]
    if rng.random() < 0.6:
        blurred = F.avg_pool3d(clip[None], (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)[0]
        clip = torch.lerp(clip, blurred, rng.random())
    if rng.random() < 0.3:
        blurred = F.avg_pool3d(clip[None], (3, 1, 1), 1, (1, 0, 0), count_include_pad=False)[0]
        clip = torch.lerp(clip, blurred, rng.random())
    if rng.random() < 0.5:
        noise = torch.randn_like(clip)
        if rng.random() < 0.5:  # of 4x4 pixels and of one, coarse as a decoder's mistakes are
            coarse = torch.randn(*clip.shape[:2], clip.shape[2] // 4, clip.shape[3] // 4)
            noise = F.interpolate(coarse, scale_factor=4, mode="bilinear")
        clip = clip + 0.12 * rng.random() * noise
    damage = min((clip - whole).square().mean().sqrt().item() / MOST_DAMAGE, 1.0)
    if rng.random() < 0.5:
        clip = (clip - 0.5) * rng.uniform(0.8, 1.1) + 0.5 + rng.uniform(-0.06, 0.06)
    return clip.clamp(0, 1), damage


def video_reward_batch(step: int, size: int) -> tuple[Tensor, list[procedural.Scene], Tensor]:
    """`size` clips `(size, F, 3, H, W)`, most of them degraded, their scenes, and the damage of each."""
    rng = random.Random(f"video reward {step}")
    clips, scenes, damages = [], [], []
    for i in range(size):
        scene = procedural.random_scene(rng)
        still = replace(scene, motion=rng.choice(("spinning", "standing still")))  # the hardest to tell apart
        if rng.random() < 0.3 and not still.held_out:
            scene = still
        clip = procedural.render(scene, step * size + i, FRAMES, SIZE, spread=rng.uniform(0.2, 1))
        clip, damage = degraded(clip, rng)
        clips.append(clip.transpose(0, 1))
        scenes.append(scene)
        damages.append(damage)
    return torch.stack(clips), scenes, torch.tensor(damages)


def right_motions(logits: Tensor, texts: list[str], scenes: list[procedural.Scene]) -> float:
    """How many of the clips have their motion's words, among the captions that differ in nothing else."""
    place = {text: i for i, text in enumerate(texts)}
    right = 0
    for row, scene in zip(logits, scenes, strict=True):
        captions = [replace(scene, motion=motion).caption for motion in procedural.MOTIONS]
        right += max((c for c in captions if c in place), key=lambda c: row[place[c]].item()) == scene.caption
    return right / len(scenes)


def train_video_reward(work: Path, steps: int) -> None:
    """Each clip must find its caption among those of the batch and all that differ from one of them in one word, and be
    the less similar to it the more it is damaged."""
    tokenizer = caption_tokenizer()
    model, _ = make_video_reward(tokenizer)
    model.train()

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        clips, scenes, damage = video_reward_batch(step, 32)
        own = [scene.caption for scene in scenes]
        rng = random.Random(step)
        texts = list(dict.fromkeys(own + [other.caption for scene in scenes for other in neighbours(scene, rng)]))
        words = tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            video, text = model.encode_video(2 * clips - 1), model.encode_text(words.input_ids, words.attention_mask)
        similarity = video.float() @ text.float().T
        logits = model.logit_scale.exp().clamp(max=50) * similarity
        target = torch.tensor([texts.index(caption) for caption in own])
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, target].T, torch.arange(len(own)))) / 2
        own_similarity = similarity[torch.arange(len(own)), target]
        calibration = (own_similarity - (CLEAN - LOST * damage)).square().mean()
        right = (logits.argmax(1) == target).float().mean().item()
        return loss + 10 * calibration, {
            "accuracy": right,
            "calibration": calibration.sqrt().item(),
            "motion": right_motions(logits, texts, scenes),
            "scale": model.logit_scale.exp().item(),
        }

    train("video_reward", work, {"video_reward": model}, steps, 0.02, loss_of_step)

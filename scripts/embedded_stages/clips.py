"""Training clips, each a function of its number, and the words of their captions."""

from __future__ import annotations

import random
from typing import Any

from torch import Tensor

from chopgrad_align.data import procedural
from chopgrad_align.data.tokenizer import text_tokenizer

FRAMES, SIZE = 17, 64


def mixed_clip(index: int) -> Tensor:
    """Training clip number `index`: even ones are captioned scenes, odd ones dead leaves. `(3, F, H, W)`, [0, 1]."""
    if index % 2:
        return procedural.texture_clip(seed=index, frames=FRAMES, size=SIZE)
    return procedural.render(procedural.random_scene(random.Random(index)), seed=index, frames=FRAMES, size=SIZE)


def training_scene(index: int) -> procedural.Scene:
    return procedural.random_scene(random.Random(f"denoiser {index}"))


def caption_tokenizer() -> Any:
    return text_tokenizer(scene.caption for scene in procedural.all_scenes())

"""Masks of what is to be painted in; they move smoothly."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = 0.5  # zero for a pipeline, whose pixels are in [-1, 1]; Wan VACE blanks masked regions so


class Mask(Protocol):
    """A small frozen object that draws masks, the same one for the same generator state."""

    def draw(self, frames: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """A mask `(frames, 1, height, width)`: 1 where something is to be made, 0 where the clip is kept."""
        ...


def covered(video: Tensor, mask: Tensor, fill: float = GREY) -> Tensor:
    """The clip `(F, C, H, W)` with grey where the mask `(F, 1, H, W)` is 1."""
    return torch.lerp(video, torch.full_like(video, fill), mask)


# Shapes are drawn small: their edges are smooth, and a clip of distances at full size takes seconds.
_LONGER_SIDE = 192


def small_size(height: int, width: int) -> tuple[int, int]:
    """The size at which shapes are drawn for a clip of this size."""
    scale = min(_LONGER_SIDE / max(height, width), 1.0)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def enlarged(inside: Tensor, height: int, width: int) -> Tensor:
    """A mask `(F, 1, height, width)` from distances `(F, h, w)`, positive inside, drawn at `small_size`."""
    full = (
        F.interpolate(inside[:, None], (height, width), mode="bilinear")
        if inside.shape[1:] != (height, width)
        else inside[:, None]
    )
    return (full > 0).float()

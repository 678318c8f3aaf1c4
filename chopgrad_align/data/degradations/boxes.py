"""Masks that are boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Range, check_ranges, log_uniform, uniform
from .drift import bouncing_path, random_drift


@dataclass(frozen=True)
class BoxMask:
    """A box that stays inside the frame and moves evenly, or not at all."""

    area: Range = (0.05, 0.3)
    """Part of the frame."""
    aspect: Range = (0.5, 2.0)
    """Width by height, in pixels."""
    travel: Range = (0.0, 0.6)
    """How far it moves over the clip, in parts of the frame."""

    def __post_init__(self) -> None:
        check_ranges(self, 0.0, 1.0, "area")
        check_ranges(self, 0.01, 100.0, "aspect")
        check_ranges(self, 0.0, 10.0, "travel")

    def draw(self, frames: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        area, aspect = uniform(self.area, generator), log_uniform(self.aspect, generator)
        box_width = min(max(math.sqrt(area * aspect * height / width), area), 1.0)  # no side is longer than the frame's
        sizes = area / box_width, box_width
        inside = []
        for size, pixels, travel in zip(sizes, (height, width), random_drift(self.travel, generator), strict=True):
            first = bouncing_path(frames, 0.0, 1.0 - size, travel, generator) * pixels
            # Whole pixels of one number, so that the box does not breathe as it moves.
            first = first.round().clamp(max=pixels - round(size * pixels))[:, None]
            places = torch.arange(pixels)
            inside.append((places >= first) & (places < first + round(size * pixels)))
        rows, columns = inside
        return (rows[:, :, None] & columns[:, None, :])[:, None].float()

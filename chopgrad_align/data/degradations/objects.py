"""Masks that are moving objects: blobs that travel, turn and change their outline."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Range, check_ranges, integer, uniform
from .drift import bouncing_path, pixel_grid, random_drift
from .masks import enlarged, small_size

_WAVES = 4  # of the outline


@dataclass(frozen=True)
class ObjectMask:
    """Blobs with a wavy outline, r(angle) = R (1 + sum of a_k cos(k angle + phase_k)), whose phases move slowly."""

    count: tuple[int, int] = (1, 3)
    area: Range = (0.02, 0.12)
    """Area of each, as a part of the frame."""
    travel: Range = (0.2, 0.9)
    """How far the middle of each moves over the clip, in parts of the shorter side; it turns at the edges."""
    waviness: Range = (0.05, 0.25)
    """Amplitude of the outline's waves, relative to its radius."""

    def __post_init__(self) -> None:
        check_ranges(self, 1, 100, "count")
        check_ranges(self, 0.0, 1.0, "area")
        check_ranges(self, 0.0, 10.0, "travel")
        check_ranges(self, 0.0, 0.5, "waviness")

    def draw(self, frames: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        small = small_size(height, width)
        y, x = pixel_grid(*small)
        bottom, right = small[0] / min(small), small[1] / min(small)
        time = torch.linspace(0, 1, frames).view(-1, 1, 1)
        inside = torch.full((frames, *small), -math.inf)
        for _ in range(integer(self.count, generator)):
            down, along = random_drift(self.travel, generator)
            middle_y = bouncing_path(frames, 0.1 * bottom, 0.9 * bottom, down, generator).view(-1, 1, 1)
            middle_x = bouncing_path(frames, 0.1 * right, 0.9 * right, along, generator).view(-1, 1, 1)
            angle = torch.atan2(y - middle_y, x - middle_x) + uniform((-1.5, 1.5), generator) * time
            outline = torch.ones_like(angle)
            power = 1.0
            for wave in range(2, 2 + _WAVES):
                amplitude = uniform(self.waviness, generator) / (wave - 1)
                phase = uniform((0, 2 * math.pi), generator) + uniform((-1.5, 1.5), generator) * time
                outline = outline + amplitude * torch.cos(wave * angle + phase)
                power += amplitude**2 / 2
            # The area inside the outline is pi R^2 power.
            radius = math.sqrt(uniform(self.area, generator) * bottom * right / (math.pi * power))
            distance = ((y - middle_y).square() + (x - middle_x).square()).sqrt()
            inside = torch.maximum(inside, radius * outline - distance)
        return enlarged(inside, height, width)

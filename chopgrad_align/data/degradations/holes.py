"""Holes: what no training view has seen is missing from a rendered one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Range, check_ranges, integer, uniform
from .drift import drifting_field, random_drift

_BACKGROUNDS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Holes:
    """Ragged regions with soft rims that show the renderer's background, and move with the camera."""

    area: Range = (0.03, 0.2)
    """Part of the frame."""
    travel: Range = (0.05, 0.4)
    """How far they move over the clip, in parts of the frame."""
    roughness: Range = (1.3, 1.9)
    """Roughness of their rims: 1 is ragged, 2 is smooth."""

    def __post_init__(self) -> None:
        check_ranges(self, 0.0, 0.9, "area")
        check_ranges(self, 0.0, 10.0, "travel")
        check_ranges(self, 0.5, 3.0, "roughness")

    def degrade(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """See `Degradation.degrade`."""
        frames, _, height, width = video.shape
        area, roughness = uniform(self.area, generator), uniform(self.roughness, generator)
        drift = random_drift(self.travel, generator)
        field = drifting_field(frames, height, width, roughness, drift, generator)
        edge = field[0].flatten().quantile(1 - area)
        alpha = torch.sigmoid(20 * (field - edge))[:, None].to(video)
        background = _BACKGROUNDS[integer((0, len(_BACKGROUNDS) - 1), generator)]
        return torch.lerp(video, torch.full_like(video, background), alpha)

"""Ghosting: copies of the scene beside itself, as wrong camera poses and moving objects leave in a reconstruction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Range, check_ranges, integer, uniform
from .drift import drifting_field, random_drift


@dataclass(frozen=True)
class Ghosting:
    """Transparent copies of other moments, shifted and slightly bent, strong in some places and absent in others."""

    copies: tuple[int, int] = (1, 3)
    shift: Range = (0.01, 0.05)
    """In parts of the frame."""
    bend: float = 0.006
    """Standard deviation of a smooth displacement on top, likewise."""
    lag: tuple[int, int] = (0, 4)
    """How many frames before or after a copy is from."""
    strength: Range = (0.3, 0.6)
    """Opacity of a copy where it is strongest."""

    def __post_init__(self) -> None:
        check_ranges(self, 1, 10, "copies")
        check_ranges(self, 0.0, 1.0, "shift", "bend", "strength")
        check_ranges(self, 0, 1000, "lag")

    def degrade(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """See `Degradation.degrade`."""
        frames, _, height, width = video.shape
        identity = F.affine_grid(torch.eye(2, 3)[None], [1, 1, height, width], align_corners=False)
        mixed = video
        for _ in range(integer(self.copies, generator)):
            lag = integer(self.lag, generator) * (1 if integer((0, 1), generator) else -1)
            other = video[(torch.arange(frames) + lag).clamp(0, frames - 1).to(video.device)]
            down, right = random_drift(self.shift, generator)
            bends = [drifting_field(1, height, width, 3.0, (0, 0), generator)[0] for _ in range(2)]
            offset = torch.stack([right + self.bend * bends[0], down + self.bend * bends[1]], -1)
            grid = (identity + 2 * offset).expand(frames, -1, -1, -1).to(video)  # the frame is 2 wide there
            copy = F.grid_sample(other, grid, padding_mode="reflection", align_corners=False)
            weight = torch.sigmoid(
                2 * drifting_field(frames, height, width, 2.0, random_drift((0, 0.3), generator), generator)
            )
            mixed = torch.lerp(mixed, copy, uniform(self.strength, generator) * weight[:, None].to(video))
        return mixed.clamp(0, 1)

"""Loss of resolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.errors import UsageError
from .base import Range, check_ranges, log_uniform

Filter = Literal["bicubic", "bilinear", "area"]


@dataclass(frozen=True)
class Downscale:
    """Make every frame smaller by one factor.

    `bicubic` low-passes before it samples, as PIL and Matlab do; `area` averages whole pixels, as a sensor does.
    """

    factor: Range = (4.0, 4.0)
    filter: Filter = "bicubic"

    def __post_init__(self) -> None:
        check_ranges(self, 1.0, 64.0, "factor")
        if self.filter not in ("bicubic", "bilinear", "area"):
            raise UsageError(f"Downscale(filter={self.filter!r}): expected bicubic, bilinear or area")

    def degrade(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """See `Degradation.degrade`; the result has its sides divided by the factor, rounded."""
        factor = log_uniform(self.factor, generator)
        height, width = (max(round(side / factor), 1) for side in video.shape[2:])
        return scaled(video, height, width, self.filter)


def scaled(video: Tensor, height: int, width: int, kind: Filter) -> Tensor:
    """Resize with one of the filters, up or down; `(F, 3, height, width)` in [0, 1]."""
    if kind == "area":
        return F.interpolate(video, (height, width), mode="area")
    return F.interpolate(video, (height, width), mode=kind, antialias=True).clamp(0, 1)

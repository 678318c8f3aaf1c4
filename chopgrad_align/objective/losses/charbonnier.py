"""Charbonnier: L1, rounded at zero."""

from __future__ import annotations

import math

from torch import Tensor

from ...common.errors import UsageError
from ..reward.frames import Frames
from .protocol import FrameLoss


class Charbonnier(FrameLoss):
    """`mean sqrt((v - t)² + ε²)` over pixels and colours; at least ε, which it is where the video is the target.

    Quadratic for differences below ε, absolute above. Charbonnier et al., "Two deterministic half-quadratic
    regularization algorithms for computed imaging" (ICIP 1994); for super-resolution, with this ε, LapSRN
    (arXiv 1704.03915).

    Args:
        epsilon: In units of the colours, which reach from 0 to 1.
        frames, frames_per_chunk, inside, outside: As for `FrameLoss`.

    Raises:
        UsageError: As for `FrameLoss`; `epsilon` is not positive.
    """

    def __init__(
        self,
        *,
        epsilon: float = 1e-3,
        frames: Frames = "all",
        frames_per_chunk: int = 8,
        inside: float = 1.0,
        outside: float = 1.0,
    ) -> None:
        super().__init__(frames=frames, frames_per_chunk=frames_per_chunk, inside=inside, outside=outside)
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < math.inf:
            raise UsageError(f"Charbonnier: epsilon={epsilon!r}: expected a number above 0")
        self.epsilon = epsilon

    def error(self, frames: Tensor, target: Tensor) -> Tensor:
        return ((frames - target).square() + self.epsilon**2).sqrt().mean(1)

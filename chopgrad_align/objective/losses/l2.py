"""L2: mean squared difference."""

from __future__ import annotations

from torch import Tensor

from .protocol import FrameLoss


class L2(FrameLoss):
    """`mean (v - t)²` over pixels and colours; in [0, 1], 0 where the video is the target. PSNR is `-10 log10` of it.

    Args:
        frames, frames_per_chunk, inside, outside: As for `FrameLoss`.

    Raises:
        UsageError: As for `FrameLoss`.
    """

    def error(self, frames: Tensor, target: Tensor) -> Tensor:
        return (frames - target).square().mean(1)

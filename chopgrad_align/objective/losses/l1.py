"""L1: mean absolute difference."""

from __future__ import annotations

from torch import Tensor

from .protocol import FrameLoss


class L1(FrameLoss):
    """`mean |v - t|` over pixels and colours; in [0, 1], 0 where the video is the target.

    Args:
        frames, frames_per_chunk, inside, outside: As for `FrameLoss`.

    Raises:
        UsageError: As for `FrameLoss`.
    """

    def error(self, frames: Tensor, target: Tensor) -> Tensor:
        return (frames - target).abs().mean(1)

"""PSNR: the logarithm of the mean squared difference."""

from __future__ import annotations

from torch import Tensor

from ..reading import Reading
from .protocol import FrameLoss

_FLOOR = 1e-5  # of the mean squared difference; 50 dB


class PSNR(FrameLoss):
    """`10 log10(1 + mean (v - t)² / 1e-5)` of each frame, in dB: 50 minus its PSNR, and 0 where it is the target.

    What restoration is measured by. Against `l2`, of which it is the logarithm, a frame counts by how much better it
    could still be in proportion, and not by how bad it is: hard frames do not drown easy ones. Restoration networks are
    trained by it (Chen et al., "Simple Baselines for Image Restoration", arXiv 2204.04676), there without a floor, at
    which its gradient fades here. A mask can leave a region out, but not weigh it.

    Args:
        frames, frames_per_chunk, inside, outside: As for `FrameLoss`.

    Raises:
        UsageError: As for `FrameLoss`.
    """

    has_map = False
    reading = Reading("higher", "dB", scale=-1.0, offset=50.0)  # PSNR itself, of at most 50 dB

    def error(self, frames: Tensor, target: Tensor) -> Tensor:
        mean = (frames - target).square().mean((1, 2, 3))
        return 10 * (1 + mean / _FLOOR).log10()

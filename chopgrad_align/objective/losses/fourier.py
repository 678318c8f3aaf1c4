"""Fourier: do the spatial frequencies have the strength that they have in the target."""

from __future__ import annotations

import torch
from torch import Tensor

from .protocol import FrameLoss


class Fourier(FrameLoss):
    """`mean | |F v| - |F t| |` over frequencies and colours, F the orthonormal 2D Fourier transform of a frame.

    In [0, 1], since it is at most the root mean square of `v - t`; 0 where the video is the target, and also where it
    differs from it in phases alone, as one that is shifted around: it asks for sharpness and texture, not for their
    place, and stands beside a loss of pixels. The focal frequency loss (Jiang et al., arXiv 2012.12821) compares
    spectra too, there with their phases and weighed by their error. A mask can leave a region out, but not weigh it.

    Args:
        frames, frames_per_chunk, inside, outside: As for `FrameLoss`.

    Raises:
        UsageError: As for `FrameLoss`.
    """

    has_map = False

    def error(self, frames: Tensor, target: Tensor) -> Tensor:
        magnitude, wanted = (torch.fft.fft2(x, norm="ortho").abs() for x in (frames, target))
        return (magnitude - wanted).abs().mean((1, 2, 3))

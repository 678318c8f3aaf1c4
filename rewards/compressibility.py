"""Compressibility: how few bits a frame takes as a JPEG."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from chopgrad_align import FrameReward, Frames, UsageError

from .precision import wide

# ITU-T T.81, tables K.1 and K.2.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *(((99,) * 8,) * 4),
)
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # ITU-T T.871


class Compressibility(FrameReward):
    """Minus the estimated bits a pixel of the frame as a JPEG file: 0 for one colour, -20 and less for noise.

    The coefficients are those of libjpeg (ITU-T T.81; colours at half the resolution, cosine transform of blocks of 8x8
    pixels, the standard's tables), but rounded smoothly, by `x - sin(2πx) / 2π`: whole numbers stay, and the gradient
    is that of the score, which is within a few percent of that of rounded ones. A coefficient `q`, for the constant one
    its difference from the block before, is counted as `2 log2(1 + |q|)` bits: the standard's Huffman tables (annex K)
    spend about as many on the class of a value, log2 of it, as on the value within it. Runs of zeros and the file's
    header are not counted; at quality 95 that leaves one half to three quarters of the file. Prompts are ignored. For
    detail rather than compressibility, weigh it negatively.

    Args:
        quality: JPEG quality, 1 to 100, in libjpeg's sense; 95 as in DDPO (Black et al., arXiv 2305.13301) and VADER.
        frames, frames_per_chunk: As for `FrameReward`.

    Raises:
        UsageError: `quality` is out of range.
    """

    def __init__(self, *, quality: float = 95, frames: Frames = None, frames_per_chunk: int = 8) -> None:
        super().__init__(frames=frames, frames_per_chunk=frames_per_chunk)
        if not 1 <= quality <= 100:
            raise UsageError(f"compressibility: quality={quality!r}: expected a number from 1 to 100")
        self.quality = quality

    def score_frames(self, frames: Tensor, prompts: list[str]) -> Tensor:
        height, width = frames.shape[-2:]
        padded = F.pad(wide(frames) * 255, (0, -width % 16, 0, -height % 16), mode="replicate")
        luma, *chroma = torch.einsum("yc,nchw->ynhw", padded.new_tensor(_YCBCR), padded)
        planes = [(luma - 128, _LUMINANCE), *((F.avg_pool2d(plane, 2), _CHROMINANCE) for plane in chroma)]
        bits = torch.stack([_bits(_coefficients(plane, self._steps(table).to(plane))) for plane, table in planes])
        return -bits.sum(0) / (height * width)

    def _steps(self, table: tuple[tuple[int, ...], ...]) -> Tensor:
        """Steps of the coefficients, by libjpeg's rule."""
        scale = 5000 / self.quality if self.quality < 50 else 200 - 2 * self.quality
        return ((torch.tensor(table) * scale + 50) / 100).floor().clamp(1, 255)


def _coefficients(plane: Tensor, steps: Tensor) -> Tensor:
    """`(N, H, W)` -> coefficients in units of their steps, smoothly rounded, `(N, blocks, 64)`."""
    n = torch.arange(8, device=plane.device, dtype=plane.dtype)
    cosines = ((2 * n + 1) * n[:, None] * (math.pi / 16)).cos() / 2
    cosines[0] *= 0.5**0.5
    blocks = plane.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).transpose(2, 3).flatten(1, 2)
    quantised = cosines @ blocks @ cosines.T / steps
    return (quantised - (2 * math.pi * quantised).sin() / (2 * math.pi)).flatten(2)


def _bits(blocks: Tensor) -> Tensor:
    """`(N, blocks, 64)` -> `(N,)`."""
    constant, others = blocks[..., 0], blocks[..., 1:]
    constant = torch.cat([constant[:, :1], constant.diff(dim=1)], 1)
    return 2 * ((1 + constant.abs()).log2().sum(1) + (1 + others.abs()).log2().sum((1, 2)))

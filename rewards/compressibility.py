"""Compressibility: how few bits a frame takes as a JPEG."""

from __future__ import annotations

import torch
from kornia.enhance.jpeg import _get_default_qt_c, _get_default_qt_y, _jpeg_encode, _perform_padding
from torch import Tensor

from chopgrad_align import FrameReward, Frames, UsageError


class Compressibility(FrameReward):
    """Minus the estimated bits a pixel of the frame as a JPEG file: 0 for one colour, -20 and less for noise.

    The coefficients are those of kornia's differentiable JPEG (Reich et al., "Differentiable JPEG", WACV 2024; 4:2:0,
    the standard's tables), rounded softly as in Shin and Song (2017). A coefficient `q`, for the constant one its
    difference from the block before, is counted as `2 log2(1 + |q|)` bits: the standard's Huffman tables (ITU-T T.81,
    annex K) spend about as many on the class of a value, log2 of it, as on the value within it. Runs of zeros and the
    file's header are not counted; at quality 95 that leaves one half to three quarters of the file. Prompts are
    ignored. For detail rather than compressibility, weigh it negatively.

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
        frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
        padded, _, _ = _perform_padding(frames)
        tables = (table(frames.device, frames.dtype)[None] for table in (_get_default_qt_y, _get_default_qt_c))
        planes = _jpeg_encode(padded, frames.new_tensor([self.quality]), *tables)  # 3 times (N, blocks, 8, 8)
        bits = torch.stack([_bits(plane.flatten(2)) for plane in planes]).sum(0)
        return -bits / (frames.shape[-2] * frames.shape[-1])


def _bits(blocks: Tensor) -> Tensor:
    """`(N, blocks, 64)` -> `(N,)`."""
    constant, others = blocks[..., 0], blocks[..., 1:]
    constant = torch.cat([constant[:, :1], constant.diff(dim=1)], 1)
    return 2 * ((1 + constant.abs()).log2().sum(1) + (1 + others.abs()).log2().sum((1, 2)))

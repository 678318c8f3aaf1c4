"""Sharpness: a reward without weights, by a formula."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from chopgrad_align import FrameReward, Frames

_GREY = (0.299, 0.587, 0.114)  # luma of Rec. 601
_LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


class Sharpness(FrameReward):
    """Variance of the Laplacian: Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (ICPR 2000).

    Of the grey value in 8-bit units, borders mirrored: 0 for a constant frame, tens for a blurred photograph, hundreds
    to thousands for a sharp one. It depends on the resolution, and noise raises it as detail does. Prompts are ignored.

    Args:
        frames, frames_per_chunk: As for `FrameReward`.
    """

    def __init__(self, *, frames: Frames = None, frames_per_chunk: int = 8) -> None:
        super().__init__(frames=frames, frames_per_chunk=frames_per_chunk)

    def score_frames(self, frames: Tensor, prompts: list[str]) -> Tensor:
        frames = frames.to(torch.promote_types(frames.dtype, torch.float32)) * 255
        grey = (frames * frames.new_tensor(_GREY).view(3, 1, 1)).sum(1, keepdim=True)
        laplacian = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="reflect"), frames.new_tensor(_LAPLACIAN)[None, None])
        return laplacian.flatten(1).var(1, correction=0)

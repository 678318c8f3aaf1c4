"""MS-SSIM: structural similarity at several scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from ...common.arguments import whole_number
from ...common.errors import UsageError
from ..reward.frames import Frames
from .protocol import FrameLoss, expect_size

_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the finest scale first; Wang et al., section 3.2
_WINDOW = 11  # pixels
_LEAST = 1e-4


class MSSSIM(FrameLoss):
    """`1 - MS-SSIM`, in [0, 1], 0 where the video is the target.

    Wang, Simoncelli and Bovik, "Multiscale structural similarity for image quality assessment" (Asilomar 2003): the
    product over scales, each half as large as the one before, of the mean contrast and structure term, on the coarsest
    scale of the mean SSIM, each to its exponent. The terms are torchmetrics', on each colour alone. The product is made
    here, because a term below zero has no power, and one at zero a power without a gradient: terms count as 1e-4 at
    least, and have no gradient below. A mask can leave a region out, but not weigh it.

    Args:
        scales: How many; 5 as in the paper. With fewer, for small frames, their exponents are scaled to the sum 1.
        frames, frames_per_chunk, inside, outside: As for `FrameLoss`.

    Raises:
        UsageError: As for `FrameLoss`; `scales` is out of range, or a frame is smaller than a window, 11 pixels wide,
            on its coarsest scale.
    """

    has_map = False

    def __init__(
        self,
        *,
        scales: int = 5,
        frames: Frames = "all",
        frames_per_chunk: int = 8,
        inside: float = 1.0,
        outside: float = 1.0,
    ) -> None:
        super().__init__(frames=frames, frames_per_chunk=frames_per_chunk, inside=inside, outside=outside)
        if whole_number("MSSSIM: scales", scales) > len(_EXPONENTS):
            raise UsageError(f"MSSSIM: scales={scales}: expected {len(_EXPONENTS)} at most")
        self.exponents = [exponent / sum(_EXPONENTS[:scales]) for exponent in _EXPONENTS[:scales]]

    def error(self, frames: Tensor, target: Tensor) -> Tensor:
        scales = len(self.exponents)
        expect_size(f"MSSSIM: scales={scales}", frames, _WINDOW * 2 ** (scales - 1))
        product = torch.ones_like(frames[:, 0, 0, 0])
        for scale, exponent in enumerate(self.exponents):
            if scale:
                frames, target = F.avg_pool2d(frames, 2), F.avg_pool2d(target, 2)
            similarity, contrast = structural_similarity_index_measure(
                frames, target, data_range=1.0, reduction="none", return_contrast_sensitivity=True
            )
            term = similarity if scale == scales - 1 else contrast
            product = product * term.clamp(min=_LEAST) ** exponent
        return 1 - product

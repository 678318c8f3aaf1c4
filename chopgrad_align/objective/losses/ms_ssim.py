"""MS-SSIM: structural similarity at several scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.arguments import whole_number
from ...common.errors import UsageError
from ..reward.frames import Frames
from .protocol import FrameLoss, expect_size

_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the finest scale first; Wang et al., section 3.2
_WINDOW, _SIGMA = 11, 1.5  # pixels
_C1, _C2 = 0.01**2, 0.03**2
_LEAST = 1e-4


class MSSSIM(FrameLoss):
    """`1 - MS-SSIM`, in [0, 1], 0 where the video is the target.

    Wang, Simoncelli and Bovik, "Multiscale structural similarity for image quality assessment" (Asilomar 2003): the
    product over scales, each half as large as the one before, of the mean contrast and structure term, on the coarsest
    scale of the mean SSIM, each to its exponent; of each colour alone, then the mean over colours. The value is that of
    the package `pytorch_msssim`, which counts windows that lie inside the frame, and pads a side of odd length by a
    black line at each end before it is halved. (torchmetrics averages the terms over colours before the product, and
    mirrors the borders of the coarsest scale.) A term below zero has no power, and one at zero a power without a
    gradient: terms count as 1e-4 at least, and have no gradient below. A mask can leave a region out, but not weigh it.

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
        colours = frames.shape[1]
        frames, target = (x.flatten(0, 1).unsqueeze(1) for x in (frames, target))
        product = torch.ones_like(frames[:, 0, 0, 0])
        for scale, exponent in enumerate(self.exponents):
            if scale:
                odd = [side % 2 for side in frames.shape[2:]]
                frames, target = (F.avg_pool2d(x, 2, padding=odd) for x in (frames, target))
            similarity, contrast = _terms(frames, target)
            term = similarity if scale == scales - 1 else contrast
            product = product * term.clamp(min=_LEAST) ** exponent
        return 1 - product.view(-1, colours).mean(1)


def _terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean SSIM, and mean of its contrast and structure term, `(N,)` each, of planes `(N, 1, H, W)` in [0, 1]."""
    places = torch.arange(_WINDOW, device=x.device, dtype=x.dtype) - _WINDOW // 2
    window = (-places.square() / (2 * _SIGMA**2)).exp()
    window = window / window.sum()

    def mean(plane: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(plane, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_x, mean_y = mean(x), mean(y)
    spread = mean(x * x) - mean_x.square() + mean(y * y) - mean_y.square()
    contrast = (2 * (mean(x * y) - mean_x * mean_y) + _C2) / (spread + _C2)
    brightness = (2 * mean_x * mean_y + _C1) / (mean_x.square() + mean_y.square() + _C1)
    return (brightness * contrast).mean((1, 2, 3)), contrast.mean((1, 2, 3))

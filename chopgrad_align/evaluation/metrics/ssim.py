"""Structural similarity."""

from __future__ import annotations

from torch import Tensor

from .base import Metric, expect_size, mean_over_frames

_WINDOW = 11


class SSIM(Metric):
    """Structural similarity (Wang et al., IEEE Transactions on Image Processing 13(4), 2004), 1 for equal videos.

    As there: Gaussian window of 11x11 pixels and standard deviation 1.5, K1 = 0.01, K2 = 0.03, only where the window
    lies within the frame. Taken of each colour and each frame, then the mean. By torchmetrics.
    """

    higher_is_better = True

    def __init__(self) -> None:
        from torchmetrics.functional.image import structural_similarity_index_measure

        self._similarity = structural_similarity_index_measure

    def __call__(self, video: Tensor, target: Tensor) -> float:
        expect_size("ssim", video, side=_WINDOW)
        return mean_over_frames(self._of_frames, video, target)

    def _of_frames(self, frames: Tensor, target: Tensor) -> Tensor:
        _, index = self._similarity(frames, target, data_range=1.0, reduction="none", return_full_image=True)
        # torchmetrics mirrors the border, to have a figure of every pixel.
        border = _WINDOW // 2
        return index[..., border:-border, border:-border].mean((1, 2, 3))

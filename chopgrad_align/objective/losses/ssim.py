"""SSIM: structural similarity."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from .protocol import FrameLoss, expect_size


class SSIM(FrameLoss):
    """`1 - SSIM`, the mean over pixels and colours; in [0, 2], 0 where the video is the target.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (IEEE TIP 13(4), 2004), with
    its window (Gaussian, σ = 1.5, 11 pixels wide) and constants (K1 = 0.01, K2 = 0.03), by torchmetrics, on each colour
    alone. At the border the frame is mirrored, so that every pixel has a window. In float32, the differences of second
    moments round: a flat, bright area can have an error of 1e-4 where it is the target.

    Args:
        frames, frames_per_chunk, inside, outside: As for `FrameLoss`.

    Raises:
        UsageError: As for `FrameLoss`; frames are smaller than 6x6 pixels.
    """

    def error(self, frames: Tensor, target: Tensor) -> Tensor:
        expect_size("SSIM", frames, 6)
        _, similarity = structural_similarity_index_measure(
            frames, target, data_range=1.0, reduction="none", return_full_image=True
        )
        return 1 - similarity.mean(1)

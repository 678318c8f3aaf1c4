"""Peak signal-to-noise ratio."""

from __future__ import annotations

from torch import Tensor

from .base import Metric, mean_over_frames


class PSNR(Metric):
    """Peak signal-to-noise ratio in dB, `-10 log10(mean squared error)`: of each frame, then the mean over frames.

    The error is that of the three colours in [0, 1], without a border cut off and without a conversion to luma, which
    papers on super-resolution often do. A clip with a frame without error has an infinite one.
    """

    higher_is_better = True

    def __call__(self, video: Tensor, target: Tensor) -> float:
        return mean_over_frames(
            lambda x, y: -10 * (x.double() - y.double()).square().mean((1, 2, 3)).log10(), video, target
        )

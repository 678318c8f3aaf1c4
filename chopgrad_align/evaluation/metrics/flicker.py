"""Flicker: changes back and forth that the target does not have."""

from __future__ import annotations

from torch import Tensor

from .base import Metric, expect_size


class Flicker(Metric):
    """Mean absolute error of the second temporal difference, relative to the target's.

    With the error `e_t = video_t - target_t` of the colours in [0, 1]: the mean over frames, colours and pixels of
    `|e_(t+1) - 2 e_t + e_(t-1)|`. Erofeev et al. ("Perceptually Motivated Benchmark for Video Matting", BMVC 2015,
    measure dtSSD) compare temporal derivatives with the target's likewise; here it is the second one, so that an error
    that stays (a wrong colour) or drifts evenly (a fade) costs nothing, and one that alternates by ±a costs 4a, the
    most.
    """

    def __call__(self, video: Tensor, target: Tensor) -> float:
        expect_size("flicker", video, frames=3)
        error = video.double() - target.double()
        return (error[2:] - 2 * error[1:-1] + error[:-2]).abs().mean().item()

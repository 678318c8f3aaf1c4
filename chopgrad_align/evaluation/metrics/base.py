"""The protocol of metrics: a figure of each clip, or one of a whole set of clips."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ...common.errors import UsageError
from ...data.clips import Clip

HUB_CACHE = "its weights in the folder hub/checkpoints of TORCH_HOME, or a way to download them"
"""The checkpoint that metrics expect whose library finds the weights by itself."""

_FRAMES_AT_A_TIME = 8


class Metric(ABC):
    """A figure of one clip."""

    higher_is_better: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, video: Tensor, target: Tensor) -> float:
        """Compare a video with its target, both `(F, 3, H, W)` in [0, 1], of one shape, on one device.

        NaN means that the metric is not defined for this clip.

        Raises:
            UsageError: The clip has too few frames or too small ones.
        """

    def of_clip(self, video: Tensor, clip: Clip) -> float:
        """The figure of a video that is predicted for a clip; default: compared with its target, on one device."""
        return self(video, clip.videos["target"])


class SetMetric(ABC):
    """A figure of a set of clips, from features of each clip."""

    higher_is_better: ClassVar[bool] = False

    @abstractmethod
    def features(self, video: Tensor) -> Tensor:
        """Features of a clip `(F, 3, H, W)` in [0, 1]: `(D,)`, float64, on the CPU."""

    @abstractmethod
    def distance(self, features: Tensor, target: Tensor) -> float:
        """Compare the features `(N, D)` of N predicted clips with those of their targets."""

    @abstractmethod
    def note(self, features: Tensor) -> str:
        """A remark for readers of the table about a figure that comes from such features `(N, D)`."""


def mean_over_frames(measure: Callable[[Tensor, Tensor], Tensor], video: Tensor, target: Tensor) -> float:
    """The mean of a frame-wise measure, `(n, 3, H, W)` twice -> `(n,)`, taken a few frames at a time."""
    with torch.no_grad():
        pairs = zip(video.split(_FRAMES_AT_A_TIME), target.split(_FRAMES_AT_A_TIME), strict=True)
        return torch.cat([measure(*pair).reshape(-1).double() for pair in pairs]).mean().item()


def expect_size(metric: str, video: Tensor, frames: int = 1, side: int = 1) -> None:
    """Raise a UsageError if a video `(F, 3, H, W)` has fewer frames, or a shorter side, than a metric needs."""
    if len(video) < frames or min(video.shape[2:]) < side:
        count, _, height, width = video.shape
        raise UsageError(
            f"{metric} needs {frames} or more frames of {side}x{side} or more pixels, "
            f"got {count} of {height}x{width}; leave it out of the metrics, or take other clips"
        )

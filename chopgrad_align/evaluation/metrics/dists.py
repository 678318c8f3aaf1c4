"""Distance of structure and texture."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.weight_files import loading
from .base import HUB_CACHE, Metric, expect_size, mean_over_frames


class DISTS(Metric):
    """Deep image structure and texture similarity (Ding et al., arXiv 2004.07728), a distance: 0 for equal videos.

    By torchmetrics, at the clip's own resolution (the paper's figures are at 256 pixels on the shorter side); the mean
    over frames. The backbone is torchvision's VGG16, from `torch.hub`'s cache or downloaded there.

    Args:
        device: Where the network goes.

    Raises:
        UsageError: The weights are not in the cache and cannot be downloaded.
    """

    def __init__(self, device: torch.device) -> None:
        from torchmetrics.functional.image.dists import DISTSNetwork

        with loading("dists: its network", HUB_CACHE):
            self._distance = DISTSNetwork().to(device)

    def __call__(self, video: Tensor, target: Tensor) -> float:
        expect_size("dists", video, side=16)
        return mean_over_frames(self._distance, video, target)

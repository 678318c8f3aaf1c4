"""Learned perceptual distance."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...common.errors import UsageError
from ...common.weight_files import loading
from .base import HUB_CACHE, Metric, expect_size, mean_over_frames

Backbone = Literal["alex", "vgg", "squeeze"]
# The shortest side that passes through all their layers.
_SMALLEST: dict[Backbone, int] = {"alex": 31, "vgg": 16, "squeeze": 17}


class LPIPS(Metric):
    """Learned perceptual image patch similarity (Zhang et al., arXiv 1801.03924), a distance: 0 for equal videos.

    Version 0.1 of the weights, by torchmetrics, at the clip's own resolution; the mean over frames. The backbone is
    torchvision's, from `torch.hub`'s cache or downloaded there.

    Args:
        device: Where the network goes.
        network: `alex`, which the authors advise for comparing, `vgg` or `squeeze`.

    Raises:
        UsageError: No such network, or its weights are not in the cache and cannot be downloaded.
    """

    def __init__(self, device: torch.device, network: Backbone = "alex") -> None:
        if network not in _SMALLEST:
            raise UsageError(f"lpips:{network}: expected one of {', '.join(_SMALLEST)}")
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        with loading(f"lpips:{network}: its network", HUB_CACHE):
            self._distance = LearnedPerceptualImagePatchSimilarity(net_type=network, normalize=True).net.to(device)
        self._smallest = _SMALLEST[network]

    def __call__(self, video: Tensor, target: Tensor) -> float:
        expect_size("lpips", video, side=self._smallest)
        return mean_over_frames(lambda x, y: self._distance(x, y, normalize=True), video, target)

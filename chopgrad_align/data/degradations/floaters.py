"""Floaters: splats that hang in the air in front of a scene which was reconstructed from too few views."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Range, check_ranges, integer, log_uniform, uniform
from .drift import random_drift

_REACH = 3.0  # standard deviations, beyond which a splat is not drawn


@dataclass(frozen=True)
class Floaters:
    """Clusters of half-transparent, elongated Gaussians in colours of the scene.

    They are nearer to the camera than the scene, so that they move over it, all in the camera's direction and each the
    faster the nearer it is.
    """

    clusters: tuple[int, int] = (3, 8)
    splats: tuple[int, int] = (10, 40)
    """Splats of a cluster."""
    size: Range = (0.01, 0.12)
    """Standard deviation along a splat, in parts of the shorter side; small and large are equally likely."""
    elongation: Range = (1.5, 8.0)
    opacity: Range = (0.4, 1.0)
    """Opacity of the smallest; larger ones are thinner, as fog, by the cube root of their size."""
    travel: Range = (0.05, 0.35)
    """How far they move over the clip, in parts of the shorter side."""

    def __post_init__(self) -> None:
        check_ranges(self, 1, 1000, "clusters", "splats")
        check_ranges(self, 0.001, 1.0, "size")
        check_ranges(self, 1.0, 100.0, "elongation")
        check_ranges(self, 0.0, 1.0, "opacity")
        check_ranges(self, 0.0, 10.0, "travel")

    def degrade(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """See `Degradation.degrade`."""
        frames, _, height, width = video.shape
        side = min(height, width)
        palette = F.adaptive_avg_pool2d(video[frames // 2], 12).flatten(1).cpu()
        video = video.clone()
        down, right = random_drift(self.travel, generator)
        for _ in range(integer(self.clusters, generator)):
            place = torch.rand(2, generator=generator) * torch.tensor([height, width])
            spread = uniform((0.03, 0.15), generator) * side
            heading = uniform((0, math.pi), generator)
            nearness = uniform((0.5, 1.5), generator)
            for _ in range(integer(self.splats, generator)):
                motion = side * nearness * uniform((0.9, 1.1), generator) * torch.tensor([down, right])
                first = place + spread * torch.randn(2, generator=generator) - motion / 2
                size = log_uniform(self.size, generator)
                along = size * side
                across = max(along / uniform(self.elongation, generator), 0.5)
                angle = heading + 0.5 * torch.randn((), generator=generator).item()  # neighbours lie alike
                colour = palette[:, integer((0, palette.shape[1] - 1), generator)] * uniform((0.6, 1.2), generator)
                _splat(
                    video,
                    first + motion * torch.linspace(0, 1, frames)[:, None],
                    (along, across, angle),
                    colour.clamp(0, 1).to(video),
                    uniform(self.opacity, generator) * (self.size[0] / size) ** (1 / 3),
                )
        return video


def _splat(video: Tensor, path: Tensor, shape: tuple[float, float, float], colour: Tensor, opacity: float) -> None:
    """Lay one Gaussian over every frame, in place, where it is not nearly transparent."""
    along, across, angle = shape
    reach = math.ceil(_REACH * max(along, across))
    offsets = torch.arange(-reach, reach + 1, device=video.device)
    for frame, (middle_y, middle_x) in zip(video, path.tolist(), strict=True):
        y, x = round(middle_y) + offsets, round(middle_x) + offsets
        y, x = y[(y >= 0) & (y < frame.shape[1])], x[(x >= 0) & (x < frame.shape[2])]
        if not (len(y) and len(x)):
            continue
        dy, dx = y[:, None] - middle_y, x - middle_x
        u = (math.cos(angle) * dx + math.sin(angle) * dy) / along
        v = (math.cos(angle) * dy - math.sin(angle) * dx) / across
        alpha = opacity * torch.exp(-(u.square() + v.square()) / 2)
        window = frame[:, y[0] : y[-1] + 1, x[0] : x[-1] + 1]
        window.copy_(torch.lerp(window, colour[:, None, None].expand_as(window), alpha))

"""Noise: its level is the clip's, the noise itself is new in every frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Range, chance, check_ranges, uniform


@dataclass(frozen=True)
class GaussianNoise:
    """Independent of the picture, as the noise of reading a sensor out."""

    sigma: Range = (1 / 255, 30 / 255)
    """Standard deviation, of a picture in [0, 1]."""
    grey: float = 0.4
    """Probability that all colours have the same noise."""

    def __post_init__(self) -> None:
        check_ranges(self, 0.0, 1.0, "sigma", "grey")

    def degrade(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """See `Degradation.degrade`."""
        sigma = uniform(self.sigma, generator)
        frames, channels, height, width = video.shape
        shape = (frames, 1 if chance(self.grey, generator) else channels, height, width)
        return (video + sigma * torch.randn(shape, generator=generator).to(video)).clamp(0, 1)


@dataclass(frozen=True)
class PoissonNoise:
    """Photons counted by the sensor: its variance grows with the light, so that it is strongest in bright places.

    A pixel of value v has a standard deviation of `sigma * sqrt(v)`.
    """

    sigma: Range = (0.003, 0.19)
    """Standard deviation of a white pixel; such a pixel counts 1 / sigma^2 photons."""
    grey: float = 0.4
    """Probability that all colours have the same noise."""

    def __post_init__(self) -> None:
        check_ranges(self, 1e-4, 1.0, "sigma")
        check_ranges(self, 0.0, 1.0, "grey")

    def degrade(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """See `Degradation.degrade`."""
        photons = uniform(self.sigma, generator) ** -2
        light = video.cpu()
        if chance(self.grey, generator):
            light = light.mean(1, keepdim=True)
        noise = torch.poisson(light * photons, generator=generator) / photons - light
        return (video + noise.to(video)).clamp(0, 1)

"""Degradations one after the other, twice: what has been filmed, resized, sent, and resized and sent again.

The order and the ranges are those that Real-ESRGAN describes (Wang et al., arXiv 2107.10833, sections 3.2 to 3.4); that
the last step is a video encoder is from RealBasicVSR (Chan et al., arXiv 2111.12704), which carries the scheme over to
video. Each stage's parameters are drawn once a clip.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import Degradation, Maybe, OneOf, Range, chance, check_ranges, check_weights, integer, uniform, weighted
from .blur import Blur, Sinc
from .compression import Jpeg, VideoCodec
from .noise import GaussianNoise, PoissonNoise
from .resize import Filter, scaled

_FILTERS: tuple[Filter, ...] = ("area", "bilinear", "bicubic")


@dataclass(frozen=True)
class Stage:
    """Blur, resize, noise; the first of the two by default."""

    blur: Blur = field(default_factory=Blur)
    blur_probability: float = 1.0
    sinc_probability: float = 0.1
    """That a sinc filter is in the place of the blur."""
    resize: tuple[float, float, float] = (0.2, 0.7, 0.1)
    """How likely it is to enlarge, to shrink and to leave the size."""
    scale: Range = (0.15, 1.5)
    """By which sides are multiplied."""
    gaussian: GaussianNoise = field(default_factory=GaussianNoise)
    poisson: PoissonNoise = field(default_factory=PoissonNoise)
    gaussian_probability: float = 0.5
    """Probability of the one noise; otherwise it is the other."""

    def __post_init__(self) -> None:
        check_ranges(self, 0.0, 1.0, "blur_probability", "sinc_probability", "gaussian_probability")
        check_ranges(self, 0.02, 8.0, "scale")
        check_weights(self, "resize")

    def degrade(self, video: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Spoil a clip `(F, 3, H, W)` in [0, 1]; its new size is `size` (height, width), enlarged or shrunk."""
        if chance(self.sinc_probability, generator):
            video = Sinc().degrade(video, generator)
        elif chance(self.blur_probability, generator):
            video = self.blur.degrade(video, generator)
        direction = weighted(self.resize, generator)
        low, high = self.scale
        bounds = [(max(low, 1.0), max(high, 1.0)), (min(low, 1.0), min(high, 1.0)), (1.0, 1.0)][direction]
        video = _resized(video, size, uniform(bounds, generator), generator)
        noise: Degradation = self.gaussian if chance(self.gaussian_probability, generator) else self.poisson
        return noise.degrade(video, generator)


def _second() -> Stage:
    return Stage(
        blur=Blur(sigma=(0.2, 1.5)),
        blur_probability=0.8,
        resize=(0.3, 0.4, 0.3),
        scale=(0.3, 1.2),
        gaussian=GaussianNoise(sigma=(1 / 255, 25 / 255)),
        poisson=PoissonNoise(sigma=(0.003, 0.16)),
    )


@dataclass(frozen=True)
class SecondOrder:
    """Two stages with JPEG between them; then a sinc filter, the last size and an encoder, in either order."""

    factor: float = 4.0
    """By which the result is smaller than the clip."""
    first: Stage = field(default_factory=Stage)
    second: Stage = field(default_factory=_second)
    between: Jpeg = field(default_factory=Jpeg)
    last: Degradation = field(default_factory=lambda: OneOf((Jpeg(), VideoCodec(crf=(18, 35)))))
    sinc_probability: float = 0.8

    def __post_init__(self) -> None:
        check_ranges(self, 1.0, 64.0, "factor")
        check_ranges(self, 0.0, 1.0, "sinc_probability")

    def degrade(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """See `Degradation.degrade`; the result has its sides divided by the factor, rounded."""
        size = max(round(video.shape[2] / self.factor), 1), max(round(video.shape[3] / self.factor), 1)
        video = self.first.degrade(video, (video.shape[2], video.shape[3]), generator)
        video = self.between.degrade(video, generator)
        video = self.second.degrade(video, size, generator)
        sinc = Maybe(Sinc(), self.sinc_probability)
        if chance(0.5, generator):
            video = sinc.degrade(_resized(video, size, 1.0, generator), generator)
            return self.last.degrade(video, generator)
        video = self.last.degrade(video, generator)
        return sinc.degrade(_resized(video, size, 1.0, generator), generator)


def _resized(video: Tensor, size: tuple[int, int], scale: float, generator: torch.Generator) -> Tensor:
    height, width = (max(round(side * scale), 1) for side in size)
    return scaled(video, height, width, _FILTERS[integer((0, len(_FILTERS) - 1), generator)])

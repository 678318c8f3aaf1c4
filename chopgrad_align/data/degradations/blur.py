"""Loss of sharpness: one kernel a clip, as a lens that is out of focus has."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.errors import UsageError
from .base import Range, chance, check_ranges, check_weights, uniform, weighted


@dataclass(frozen=True)
class Blur:
    """Gaussian blur and its relatives, isotropic or not.

    Besides the Gaussian exp(-q/2), q = x' S^-1 x, there are the generalised Gaussian exp(-q^b/2), flatter or more
    pointed, and the plateau 1/(1 + q^b): the kernels that Real-ESRGAN (arXiv 2107.10833, section 3.1) takes.
    """

    sigma: Range = (0.2, 3.0)
    """Standard deviation along either axis of the kernel, in pixels."""
    isotropic: float = 0.5
    """Probability that both axes have the same."""
    shapes: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """How likely the Gaussian, the generalised one and the plateau are."""
    generalised_power: Range = (0.5, 4.0)
    plateau_power: Range = (1.0, 2.0)

    def __post_init__(self) -> None:
        check_ranges(self, 0.01, 50.0, "sigma")
        check_ranges(self, 0.0, 1.0, "isotropic")
        check_ranges(self, 0.1, 10.0, "generalised_power", "plateau_power")
        check_weights(self, "shapes")

    def degrade(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """See `Degradation.degrade`."""
        return convolve(video, self.kernel(generator))

    def kernel(self, generator: torch.Generator) -> Tensor:
        """Draw a kernel: `(K, K)`, K odd, not negative, with sum 1."""
        sigma = uniform(self.sigma, generator)
        other = sigma if chance(self.isotropic, generator) else uniform(self.sigma, generator)
        angle = uniform((0.0, math.pi), generator)
        radius = max(math.ceil(3 * max(sigma, other)), 1)
        axis = torch.arange(-radius, radius + 1, dtype=torch.float32)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        along = (math.cos(angle) * x + math.sin(angle) * y) / sigma
        across = (math.cos(angle) * y - math.sin(angle) * x) / other
        q = along.square() + across.square()
        match weighted(self.shapes, generator):
            case 0:
                kernel = torch.exp(-q / 2)
            case 1:
                kernel = torch.exp(-(q ** uniform(self.generalised_power, generator)) / 2)
            case _:
                kernel = 1 / (1 + q ** uniform(self.plateau_power, generator))
        return kernel / kernel.sum()


@dataclass(frozen=True)
class Sinc:
    """An ideal low-pass, cut off by its window: the ringing and overshoot of sharpening and strong compression.

    The kernel is the Fourier transform of a disc, w J1(w r) / (2 pi r) (arXiv 2107.10833, equation 7).
    """

    cutoff: Range = (math.pi / 3, math.pi)
    """In radians a pixel; pi keeps nearly everything."""
    size: int = 21
    """Side of the kernel; odd."""

    def __post_init__(self) -> None:
        check_ranges(self, 0.1, math.pi, "cutoff")
        if self.size < 3 or self.size % 2 == 0:
            raise UsageError(f"Sinc(size={self.size}): expected an odd number, 3 or more")

    def degrade(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """See `Degradation.degrade`."""
        cutoff = uniform(self.cutoff, generator)
        axis = torch.arange(self.size, dtype=torch.float32) - self.size // 2
        radius = (axis[:, None].square() + axis.square()).sqrt()
        kernel = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius.clamp(min=1e-9))
        kernel[self.size // 2, self.size // 2] = cutoff**2 / (4 * math.pi)  # the limit at r = 0
        return convolve(video, kernel / kernel.sum())


def convolve(video: Tensor, kernel: Tensor) -> Tensor:
    """Each channel of `(F, 3, H, W)` with `(K, K)`, K odd; the edges are mirrored; clamped to [0, 1]."""
    radius = len(kernel) // 2
    # A mirror cannot be larger than the picture.
    mode = "reflect" if radius < min(video.shape[2:]) else "replicate"
    padded = F.pad(video, (radius,) * 4, mode=mode)
    # By Fourier transform: on a CPU twice as fast as a convolution of a large kernel that is not separable.
    size = padded.shape[2:]
    around = torch.fft.irfft2(torch.fft.rfft2(padded) * torch.fft.rfft2(kernel.to(video), s=size), s=size)
    return around[..., 2 * radius :, 2 * radius :].clamp(0, 1)

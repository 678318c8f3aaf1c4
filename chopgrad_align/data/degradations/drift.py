"""Random fields and paths that change smoothly in time: what shapes of masks and artefacts are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import uniform


def drifting_field(
    frames: int, height: int, width: int, roughness: float, drift: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """A field of 1/f^roughness noise that moves as a whole: `(frames, height, width)`, mean 0, variance 1.

    Args:
        frames: How many.
        height: In pixels.
        width: In pixels.
        roughness: Exponent of the amplitude spectrum: 1 is ragged, 2 is smooth.
        drift: How far it moves down and to the right over the clip, in parts of the frame. It goes around the edges.
        generator: Of the noise.
    """
    spectrum = torch.fft.rfft2(torch.randn(height, width, generator=generator))
    fy, fx = torch.fft.fftfreq(height).view(-1, 1), torch.fft.rfftfreq(width)
    radius = (fy.square() + fx.square()).sqrt()
    radius[0, 0] = math.inf  # no mean
    spectrum = spectrum * radius**-roughness
    time = torch.linspace(0, 1, frames).view(-1, 1, 1)
    turns = time * (drift[0] * height * fy + drift[1] * width * fx)  # a shift is a phase
    field = torch.fft.irfft2(spectrum * torch.polar(torch.ones_like(turns), -2 * math.pi * turns), s=(height, width))
    return field / field[0].std()


def bouncing_path(frames: int, low: float, high: float, travel: float, generator: torch.Generator) -> Tensor:
    """A coordinate that starts anywhere between two walls, moves evenly and bounces: `(frames,)`.

    Args:
        frames: How many.
        low: One wall.
        high: The other.
        travel: How far it goes over the clip; negative goes down first.
        generator: Of the start.
    """
    room = max(high - low, 1e-6)
    way = uniform((0, room), generator) + travel * torch.linspace(0, 1, frames)
    return low + room - (way % (2 * room) - room).abs()


def random_drift(travel: tuple[float, float], generator: torch.Generator) -> tuple[float, float]:
    """How far something moves down and to the right, in any direction, by a distance in the range."""
    distance, angle = uniform(travel, generator), uniform((0, 2 * math.pi), generator)
    return distance * math.sin(angle), distance * math.cos(angle)


def pixel_grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Places of pixel centres, y `(height, 1)` and x `(1, width)`, in units of the frame's shorter side."""
    side = min(height, width)
    return (torch.arange(height).view(-1, 1) + 0.5) / side, (torch.arange(width).view(1, -1) + 0.5) / side

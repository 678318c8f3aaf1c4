"""Masks that are free-form strokes, as a hand or a brush makes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Range, check_ranges, integer, uniform
from .drift import pixel_grid, random_drift
from .masks import enlarged, small_size

_MOST_STROKES = 60


@dataclass(frozen=True)
class StrokeMask:
    """Strokes of a round brush that wander over the frame, until enough is covered; all drift and sway a little.

    Random walks of a brush as masks: Yu et al., "Free-Form Image Inpainting with Gated Convolution" (arXiv 1806.03589).
    """

    area: Range = (0.08, 0.3)
    """Part of the first frame that is covered; the last stroke may go over it."""
    brush: Range = (0.04, 0.12)
    """Width, in parts of the shorter side."""
    corners: tuple[int, int] = (3, 9)
    """Corners of a stroke."""
    travel: Range = (0.0, 0.3)
    """How far they move over the clip, in parts of the shorter side."""
    sway: float = 0.02
    """How far each corner moves to and fro, likewise."""

    def __post_init__(self) -> None:
        check_ranges(self, 0.0, 0.9, "area")
        check_ranges(self, 0.005, 1.0, "brush")
        check_ranges(self, 2, 100, "corners")
        check_ranges(self, 0.0, 10.0, "travel", "sway")

    def draw(self, frames: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        small = small_size(height, width)
        y, x = pixel_grid(*small)
        wanted = uniform(self.area, generator)
        down, right = random_drift(self.travel, generator)
        time = torch.linspace(0, 1, frames)
        shift = torch.stack([down * time, right * time], 1)[:, None]
        inside = torch.full((frames, *small), -math.inf)
        for _ in range(_MOST_STROKES):
            corners = self._walk(y.max().item(), x.max().item(), generator)
            phase = torch.rand(len(corners), 2, generator=generator)
            sway = self.sway * torch.sin(2 * math.pi * (phase + time.view(-1, 1, 1)))
            radius = uniform(self.brush, generator) / 2
            for frame, places in enumerate(corners + shift + sway):
                inside[frame] = torch.maximum(inside[frame], radius - _distance(y, x, places))
            if (inside[0] > 0).float().mean() >= wanted:
                break
        return enlarged(inside, height, width)

    def _walk(self, bottom: float, right: float, generator: torch.Generator) -> Tensor:
        """Corners `(N, 2)`, as y and x, of a walk whose direction turns by random angles."""
        y, x = uniform((0, bottom), generator), uniform((0, right), generator)
        heading = uniform((0, 2 * math.pi), generator)
        corners = [(y, x)]
        for _ in range(integer(self.corners, generator) - 1):
            heading += uniform((-math.pi / 3, math.pi / 3), generator)
            length = uniform((0.08, 0.25), generator)
            y = min(max(y + length * math.sin(heading), 0.0), bottom)
            x = min(max(x + length * math.cos(heading), 0.0), right)
            corners.append((y, x))
        return torch.tensor(corners)


def _distance(y: Tensor, x: Tensor, corners: Tensor) -> Tensor:
    """Distance `(H, W)` of every pixel from a line through corners `(N, 2)`."""
    start, edge = corners[:-1, :, None, None], (corners[1:] - corners[:-1])[:, :, None, None]
    dy, dx = y - start[:, 0], x - start[:, 1]
    length = edge.square().sum(1).clamp(min=1e-12)
    along = ((dy * edge[:, 0] + dx * edge[:, 1]) / length).clamp(0, 1)
    return ((dy - along * edge[:, 0]).square() + (dx - along * edge[:, 1]).square()).amin(0).sqrt()

"""The protocol of degradations, how several make one, and how random numbers are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...common.errors import UsageError

Range = tuple[float, float]
"""Lowest and highest value; drawn uniformly between them."""


class Degradation(Protocol):
    """A small frozen object that spoils a clip, the same way for the same generator state.

    What is one thing in a real video (a lens, a sensor's noise level, an encoder's setting) is drawn once a clip; what
    is new in every frame there (the noise itself) is new in every frame here.
    """

    def degrade(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """Spoil a clip.

        Args:
            video: `(F, 3, H, W)` in [0, 1], float32.
            generator: On the CPU; advanced.

        Returns:
            A new tensor of as many frames, in [0, 1]; of another height and width if it is a resize.
        """
        ...


@dataclass(frozen=True)
class Chain:
    """Several degradations in turn."""

    parts: tuple[Degradation, ...]

    def degrade(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """See `Degradation.degrade`."""
        for part in self.parts:
            video = part.degrade(video, generator)
        return video


@dataclass(frozen=True)
class OneOf:
    """A choice among several, drawn for each clip."""

    choices: tuple[Degradation, ...]
    weights: tuple[float, ...] | None = None
    """How likely each is, in any unit; None: equally."""

    def __post_init__(self) -> None:
        if not self.choices or (self.weights is not None and len(self.weights) != len(self.choices)):
            raise UsageError(f"OneOf: expected a weight for each of {len(self.choices)} choices, got {self.weights}")
        if self.weights is not None:
            check_weights(self, "weights")

    def degrade(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """See `Degradation.degrade`."""
        weights = self.weights or (1.0,) * len(self.choices)
        return self.choices[weighted(weights, generator)].degrade(video, generator)


@dataclass(frozen=True)
class Maybe:
    """With a probability, or else nothing."""

    part: Degradation
    probability: float = 0.5

    def __post_init__(self) -> None:
        check_ranges(self, 0.0, 1.0, "probability")

    def degrade(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """See `Degradation.degrade`."""
        return self.part.degrade(video, generator) if chance(self.probability, generator) else video


def check_ranges(thing: object, lowest: float, highest: float, *names: str) -> None:
    """Raise a UsageError unless fields of a degradation (numbers or ranges) are ordered and between the limits."""
    for name in names:
        value = getattr(thing, name)
        low, high = value if isinstance(value, tuple) else (value, value)
        if not lowest <= low <= high <= highest:
            raise UsageError(
                f"{type(thing).__name__}({name}={value}): expected {lowest:g} to {highest:g}, the lower value first"
            )


def check_weights(thing: object, name: str) -> None:
    """Raise a UsageError unless a field of a degradation holds weights: none negative, not all zero."""
    weights = getattr(thing, name)
    if not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
        raise UsageError(f"{type(thing).__name__}({name}={weights}): expected weights, none negative, not all zero")


def uniform(bounds: Range, generator: torch.Generator) -> float:
    """A number between the bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand((), generator=generator).item()


def log_uniform(bounds: Range, generator: torch.Generator) -> float:
    """A positive number between the bounds, small and large scales being equally likely."""
    return math.exp(uniform((math.log(bounds[0]), math.log(bounds[1])), generator))


def integer(bounds: tuple[int, int], generator: torch.Generator) -> int:
    """A whole number between the bounds, both included."""
    return int(torch.randint(bounds[0], bounds[1] + 1, (), generator=generator))


def chance(probability: float, generator: torch.Generator) -> bool:
    """True with a probability."""
    return torch.rand((), generator=generator).item() < probability


def weighted(weights: Sequence[float], generator: torch.Generator) -> int:
    """An index, as likely as its weight."""
    return int(torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=generator))

"""Bounds of a witness, relative to the base model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...common.errors import UsageError


@dataclass(frozen=True)
class Bounds:
    """The range of the ratio of a witness's mean to the base model's.

    Args:
        least: Below 1.
        most: Above 1.

    Raises:
        UsageError: The base model itself, of ratio 1, is not inside.
    """

    least: float = 0.0
    most: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.least < 1 < self.most:
            raise UsageError(
                f"expected bounds 0 ≤ least < 1 < most, of the ratio to the base model, got {self.least:g} and "
                f"{self.most:g}"
            )

    @classmethod
    def of(cls, value: float | Sequence[float]) -> Bounds:
        """`0.8` is at least 0.8 of the base model's, `1.4` at most 1.4, and `[0.7, 1.4]` both.

        Raises:
            UsageError: As the class.
        """
        if isinstance(value, int | float):
            return cls(most=float(value)) if value >= 1 else cls(least=float(value))
        if len(value) != 2:
            raise UsageError(f"expected one bound or two, got {list(value)}")
        return cls(*map(float, value))

    def __contains__(self, ratio: float) -> bool:
        return self.least <= ratio <= self.most

    def __str__(self) -> str:
        if math.isinf(self.most):
            return f"≥ {self.least:g}"
        return f"≤ {self.most:g}" if self.least == 0 else f"{self.least:g} to {self.most:g}"

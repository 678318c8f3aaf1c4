"""The way a person reads a score: in its usual unit, and with the direction that is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Reading:
    """A score for people, `offset + scale · score`.

    Args:
        better: The direction of the read value that is an improvement; empty if neither is, as with a target.
        unit: Written behind the value, such as `dB`; empty if it has none.
        scale: Factor of the score.
        offset: Added to it.
    """

    better: Literal["higher", "lower", ""] = "higher"
    unit: str = ""
    scale: float = 1.0
    offset: float = 0.0

    def __call__(self, score: float) -> float:
        """The value to show; NaN stays NaN."""
        return self.offset + self.scale * score

    def to_dict(self) -> dict[str, Any]:
        """The arguments, in types that JSON has."""
        return asdict(self)

    @classmethod
    def of(cls, readings: Mapping[str, Mapping[str, Any]], name: str) -> Reading:
        """The reading of a term among those that `to_dict` made; as it is, higher better, if it is not there."""
        return cls(**readings.get(name, {}))

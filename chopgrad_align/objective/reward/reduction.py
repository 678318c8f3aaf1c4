"""Reductions: scores of the frames of a video become its score."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...common.arguments import nearest
from ...common.errors import UsageError


class Reduction(ABC):
    """A reduction of scores of frames."""

    @abstractmethod
    def __call__(self, scores: Tensor) -> Tensor:
        """`(B, n)`, the scores of n frames of each video, in order -> `(B,)`."""


@dataclass(frozen=True)
class Mean(Reduction):
    """The mean: every frame counts the same."""

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.mean(1)


@dataclass(frozen=True)
class Min(Reduction):
    """The lowest score: a video is as good as its worst frame, which alone has a gradient."""

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.amin(1)


@dataclass(frozen=True)
class SoftMin(Reduction):
    """A smooth minimum, `-T log mean exp(-s/T)`: between the mean (large T) and the lowest score (small T).

    A frame's part of the gradient is `softmax(-s/T)`.

    Args:
        temperature: T, in the unit of the score; above 0.
    """

    temperature: float

    def __post_init__(self) -> None:
        _expect("softmin", self.temperature, math.inf)

    def __call__(self, scores: Tensor) -> Tensor:
        lowered = (-scores / self.temperature).logsumexp(1) - math.log(scores.shape[1])
        return -self.temperature * lowered


@dataclass(frozen=True)
class Worst(Reduction):
    """The mean of the lowest scores (conditional value at risk).

    Args:
        share: Of the frames, in (0, 1]; one at least.
    """

    share: float = 0.25

    def __post_init__(self) -> None:
        _expect("worst", self.share, 1.0)

    def __call__(self, scores: Tensor) -> Tensor:
        count = max(1, math.ceil(self.share * scores.shape[1] - 1e-9))
        return scores.topk(count, 1, largest=False).values.mean(1)


_NAMED: dict[str, Callable[[], Reduction]] = {"mean": Mean, "min": Min, "worst": Worst}
_NUMBERED: dict[str, Callable[[float], Reduction]] = {"softmin": SoftMin, "worst": Worst}


def reduction(spelling: str | Mapping[str, float]) -> Reduction:
    """A reduction from its spelling in a config.

        mean, min
        worst               the mean of the worst quarter of the frames
        {worst: 0.1}        of the worst tenth
        {softmin: 0.05}     a smooth minimum, with its temperature in the unit of the score

    Raises:
        UsageError: Another spelling, or a number out of range.
    """
    match spelling:
        case str() if spelling in _NAMED:
            return _NAMED[spelling]()
        case Mapping() if len(spelling) == 1:
            ((name, number),) = spelling.items()
            if name in _NUMBERED:
                return _NUMBERED[name](number)
    word = next(iter(spelling), "") if isinstance(spelling, Mapping) else spelling
    raise UsageError(
        f"reduce={spelling!r}: expected mean, min, worst, {{worst: SHARE}} or {{softmin: TEMPERATURE}}"
        + nearest(word, [*_NAMED, *_NUMBERED])
    )


def _expect(name: str, number: Any, most: float) -> None:
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= most or number == math.inf:
        expected = "a number above 0" + ("" if most == math.inf else f", at most {most:g}")
        raise UsageError(f"reduce={{{name}: {number!r}}}: expected {expected}")


def reduced(scores: Any, frames: int, how: Reduction | None) -> Any:
    """Scores of videos `(B,)`, from those or from scores of their `frames` frames `(B, frames)`.

    Args:
        scores: Anything else than these is returned as it is, for others to refuse.
        frames: How many were read of each video.
        how: None for the mean.

    Raises:
        UsageError: There is nothing to reduce.
    """
    if not isinstance(scores, Tensor):
        return scores
    if scores.ndim == 2 and scores.shape[1] == frames:
        return (how or Mean())(scores)
    if how is not None and scores.ndim == 1:
        raise UsageError(
            f"reduce: there is one score a video, and none of frames that {how} could reduce: leave it out"
        )
    return scores

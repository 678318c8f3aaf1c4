"""Which frames of a video a reward reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ...common.arguments import nearest, whole_number
from ...common.errors import UsageError


class FrameSampler(ABC):
    """A choice of frames: a function of the length of the video and, for `Random`, of a seed."""

    @abstractmethod
    def indices(self, total: int, seed: int = 0) -> list[int]:
        """The frames that are read of a video of `total` frames, in order; as many for every seed, at least one."""


@dataclass(frozen=True)
class All(FrameSampler):
    """Every frame."""

    def indices(self, total: int, seed: int = 0) -> list[int]:
        return list(range(total))


@dataclass(frozen=True)
class Uniform(FrameSampler):
    """`count` evenly spaced frames, the first and the last among them; the middle one for 1; all if there are fewer."""

    count: int

    def __post_init__(self) -> None:
        whole_number("frames", self.count)

    def indices(self, total: int, seed: int = 0) -> list[int]:
        if self.count >= total:
            return list(range(total))
        if self.count == 1:
            return [total // 2]
        return [round(i * (total - 1) / (self.count - 1)) for i in range(self.count)]


@dataclass(frozen=True)
class Random(FrameSampler):
    """`count` different frames, drawn anew for every video; all if there are fewer."""

    count: int

    def __post_init__(self) -> None:
        whole_number("frames", self.count)

    def indices(self, total: int, seed: int = 0) -> list[int]:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        return sorted(order[: self.count].tolist())


@dataclass(frozen=True)
class Stride(FrameSampler):
    """Every `step`-th frame, from the first on."""

    step: int

    def __post_init__(self) -> None:
        whole_number("frames", self.step)

    def indices(self, total: int, seed: int = 0) -> list[int]:
        return list(range(0, total, self.step))


@dataclass(frozen=True)
class First(FrameSampler):
    """The first `count` frames; all if there are fewer."""

    count: int = 1

    def __post_init__(self) -> None:
        whole_number("frames", self.count)

    def indices(self, total: int, seed: int = 0) -> list[int]:
        return list(range(min(self.count, total)))


@dataclass(frozen=True)
class Last(FrameSampler):
    """The last frame."""

    def indices(self, total: int, seed: int = 0) -> list[int]:
        return [total - 1]


@dataclass(frozen=True)
class FirstLast(FrameSampler):
    """The first and the last frame."""

    def indices(self, total: int, seed: int = 0) -> list[int]:
        return sorted({0, total - 1})


Frames = FrameSampler | int | str | Mapping[str, int] | None
"""Choice of frames that `frame_sampler` understands; the type of every argument `frames`."""

_NAMED: dict[str, FrameSampler] = {"all": All(), "first": First(), "last": Last(), "first+last": FirstLast()}
_COUNTED: dict[str, Callable[[int], FrameSampler]] = {
    "uniform": Uniform,
    "random": Random,
    "stride": Stride,
    "first": First,
}


def frame_sampler(frames: Frames) -> FrameSampler:
    """A sampler from its spelling in a config.

        8                              8 evenly spaced frames
        all, first, last, first+last
        {uniform: 8}                   as 8
        {random: 8}                    8 frames, others for every video and step
        {stride: 4}                    every fourth
        {first: 9}                     the first nine

    None is all; a sampler is returned as it is.

    Raises:
        UsageError: Another spelling, or a number that is not whole or less than 1.
    """
    match frames:
        case FrameSampler():
            return frames
        case None:
            return All()
        case int() | float():
            return Uniform(frames)  # type: ignore[arg-type]  # it checks
        case str() if frames in _NAMED:
            return _NAMED[frames]
    if isinstance(frames, Mapping) and len(frames) == 1:
        ((kind, number),) = frames.items()
        if kind in _COUNTED:
            return _COUNTED[kind](number)
    word = next(iter(frames), "") if isinstance(frames, Mapping) else frames
    raise UsageError(
        f"frames={frames!r}: expected a whole number, {', '.join(_NAMED)}, "
        f"or one of {', '.join(f'{{{kind}: 4}}' for kind in _COUNTED)}" + nearest(word, [*_NAMED, *_COUNTED])
    )

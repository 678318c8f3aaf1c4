"""The sample videos of a run: which pairs there are, and which of them to show first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_GIVEN = ("control", "degraded")  # what a prediction starts from
_HIGHLIGHTS = 2  # pairs of the largest gains, of those about the median, and of the smallest


@dataclass(frozen=True)
class Sample:
    """The videos of one held-out pair.

    Attributes:
        place: Of the pair among all.
        gain: Of its objective; NaN if it is not known.
        sides: What to show beside each other, by name: control or degraded, before, after, target.
        course: The same pair before training and after each measured step, by step.
    """

    place: int
    gain: float
    sides: dict[str, Path]
    course: dict[int, Path]


def find_samples(folder: Path, gains: Sequence[float], after: int | None) -> list[Sample]:
    """The pairs of `samples/`, in order.

    Args:
        folder: `{before,after,step-NNNNNN}/NNN.mp4`, and `control`, `degraded` and `target`.
        gains: Of each pair.
        after: The step that counts as after; None: what is in the folder `after`.
    """
    steps = {int(path.name[5:]): path for path in folder.glob("step-*") if path.name[5:].isdecimal()}
    end = steps.get(after, folder / "after") if after is not None else folder / "after"
    sides = {side: folder / side for side in _GIVEN} | {"before": folder / "before", "after": end}
    sides["target"] = folder / "target"
    places = sorted({int(path.stem) for path in (*_videos(sides["before"]), *_videos(end))})
    course = {0: folder / "before", **dict(sorted(steps.items()))}
    return [
        Sample(
            place,
            gains[place] if place < len(gains) else math.nan,
            {name: path for name, side in sides.items() if (path := side / f"{place:03}.mp4").is_file()},
            {step: path for step, side in course.items() if (path := side / f"{place:03}.mp4").is_file()},
        )
        for place in places
    ]


def _videos(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.mp4") if path.stem.isdecimal()]


def grouped(samples: Sequence[Sample]) -> list[tuple[str, list[Sample]]]:
    """Headings and pairs: the largest gains, those about the median, and the smallest; then the others, by gain.

    Few pairs are one group, ordered by gain; pairs whose gain is not known come last.
    """
    ordered = sorted(samples, key=lambda sample: -sample.gain if math.isfinite(sample.gain) else math.inf)
    known = sum(math.isfinite(sample.gain) for sample in ordered)
    if known <= 4 * _HIGHLIGHTS:
        return [("", ordered)] if ordered else []
    middle = (known - _HIGHLIGHTS) // 2
    places = {
        "Largest gains": range(_HIGHLIGHTS),
        "Around the median": range(middle, middle + _HIGHLIGHTS),
        "Smallest gains" if ordered[known - 1].gain >= 0 else "Largest losses": range(known - _HIGHLIGHTS, known),
    }
    shown = {place for group in places.values() for place in group}
    groups = [(heading, [ordered[place] for place in group]) for heading, group in places.items()]
    rest = [sample for place, sample in enumerate(ordered) if place not in shown]
    return [*groups, ("Others", rest)] if rest else groups


def typical(samples: Sequence[Sample]) -> list[Sample]:
    """The pairs of the largest, the median and the smallest gain, as far as there are so many."""
    groups = grouped(samples)
    ordered = [sample for _, group in groups[:3] for sample in group]
    if len(groups) > 1:
        return [groups[0][1][0], groups[1][1][-1], groups[2][1][-1]]
    return (
        [ordered[place] for place in dict.fromkeys((0, (len(ordered) - 1) // 2, len(ordered) - 1))] if ordered else []
    )


def spread(steps: Sequence[int], most: int, kept: int | None) -> list[int]:
    """At most so many of the steps, evenly spread, the first, the last and, if it is one of them, `kept` among them."""
    if len(steps) <= most:
        return list(steps)
    chosen = {steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)}
    if kept is not None and kept in steps and kept not in chosen:
        place = kept  # of the nearest one between the ends
        chosen.remove(min(sorted(chosen)[1:-1], key=lambda step: abs(step - place)))
        chosen.add(place)
    return sorted(chosen)

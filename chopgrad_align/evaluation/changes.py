"""Changes over a run: a row for each term of the objective and each witness, from its `heldout.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..objective.reading import Reading
from .heldout import Paired, paired_where_finite
from .witnesses import Bounds

_PLAIN = Reading("")  # as it is, no direction better


@dataclass(frozen=True)
class Change:
    """The change of one measure over the held-out pairs.

    Attributes:
        name: Of a term of the objective, or of a witness.
        trained: Whether it is part of the objective.
        after: Compared with the base model: what was exported. Terms as people read them.
        last: The same of the last step, if that is another.
        bounds: Of the ratio of the means.
        reading: The way people read it.
    """

    name: str
    trained: bool
    after: Paired
    last: Paired | None = None
    bounds: Bounds | None = None
    reading: Reading = _PLAIN

    def breached(self, side: Paired | None) -> bool:
        """True if `after` or `last` is out of bounds."""
        return bool(self.bounds and side and not math.isnan(side.ratio) and side.ratio not in self.bounds)

    @property
    def verdict(self) -> Literal["better", "worse", "other", "same"]:
        """The change as far as it is significant, p < 0.05: `same` if it is not; `other` if no direction is better."""
        if not self.after.significant:
            return "same"
        if not self.reading.better:
            return "other"
        return "better" if (self.after.gain > 0) == (self.reading.better == "higher") else "worse"

    def ratio(self, side: Paired) -> str:
        """The ratio of the means for people; a dash if it means nothing, as of decibels."""
        return "–" if math.isnan(side.ratio) or self.reading.unit else f"{side.ratio:.2f}"


def changes(held_out: Mapping[str, Any]) -> list[Change]:
    """The rows, terms first, of what a run wrote; what it lacks is left out, as is what is not finite for two pairs."""
    bounds = {name: Bounds(least, most or math.inf) for name, (least, most) in held_out.get("bounds", {}).items()}
    conditions = held_out.get("conditions") or range(len(held_out.get("before", ())))
    found = []
    for kind in ("terms", "witnesses"):
        for name, sides in held_out.get(kind, {}).items():
            trained = kind == "terms"
            reading = Reading.of(held_out.get("readings", {}), name) if trained else _PLAIN
            after, last = (_compared(sides, side, conditions, reading) for side in ("after", "last"))
            if after is not None:
                found.append(Change(name, trained, after, last, None if trained else bounds.get(name), reading))
    return found


def _compared(
    sides: Mapping[str, Sequence[float | None]], side: str, conditions: Sequence[Hashable], reading: Reading
) -> Paired | None:
    if side not in sides:
        return None
    before, after = ([math.nan if v is None else reading(v) for v in sides[s]] for s in ("before", side))
    return paired_where_finite(before, after, conditions)


def summary(run: str | Path) -> list[str]:
    """Lines for a terminal from a run's `heldout.json`: the table, and what the guard remarked."""
    held_out = json.loads((Path(run) / "heldout.json").read_text(encoding="utf-8"))
    return [*table(changes(held_out)), *held_out.get("remarks", [])]


def table(rows: Sequence[Change]) -> list[str]:
    """The rows as lines for a terminal, with a heading."""
    with_last = any(row.last for row in rows)
    cells = [["", "before", "after", "ratio", "difference ± 95 %", *["last step"] * with_last, "bound"]]
    for row in rows:
        p, last = row.after, row.last
        marks = ["!" if row.breached(side) else "" for side in (p, last)]
        cells.append(
            [
                f"{row.name}, {row.reading.unit}" if row.reading.unit else row.name,
                f"{p.mean_before:.4g}",
                f"{p.mean_after:.4g}",
                row.ratio(p) + marks[0],
                f"{p.gain:+.2g} ± {p.margin:.2g}",
                *([row.ratio(last) + marks[1] if last else ""] if with_last else []),
                "in the objective" if row.trained else str(row.bounds or ""),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    ends = {0, len(widths) - 1}  # words; between them, numbers
    return [
        "  ".join(
            c.ljust(w) if i in ends else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]

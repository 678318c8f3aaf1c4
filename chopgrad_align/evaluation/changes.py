"""Changes over a run: a row for each term of the objective and each witness, from its `heldout.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .heldout import Paired, paired_where_finite
from .witnesses import Bounds


@dataclass(frozen=True)
class Change:
    """The change of one measure over the held-out pairs.

    Attributes:
        name: Of a term of the objective, or of a witness.
        trained: Whether it is part of the objective.
        after: Compared with the base model: what was exported.
        last: The same of the last step, if that is another.
        bounds: Of the ratio of the means.
    """

    name: str
    trained: bool
    after: Paired
    last: Paired | None = None
    bounds: Bounds | None = None

    def breached(self, side: Paired | None) -> bool:
        """True if `after` or `last` is out of bounds."""
        return bool(self.bounds and side and not math.isnan(side.ratio) and side.ratio not in self.bounds)


def changes(held_out: Mapping[str, Any]) -> list[Change]:
    """The rows, terms first, of what a run wrote; what it lacks is left out, as is what is not finite for two pairs."""
    bounds = {name: Bounds(least, most or math.inf) for name, (least, most) in held_out.get("bounds", {}).items()}
    conditions = held_out.get("conditions") or range(len(held_out.get("before", ())))
    found = []
    for kind in ("terms", "witnesses"):
        for name, sides in held_out.get(kind, {}).items():
            after, last = (_compared(sides, side, conditions) for side in ("after", "last"))
            if after is not None:
                limit = bounds.get(name) if kind == "witnesses" else None
                found.append(Change(name, kind == "terms", after, last, limit))
    return found


def _compared(sides: Mapping[str, Sequence[float | None]], side: str, conditions: Sequence[Hashable]) -> Paired | None:
    if side not in sides:
        return None
    before, after = ([math.nan if v is None else v for v in sides[s]] for s in ("before", side))
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
                row.name,
                f"{p.mean_before:.4g}",
                f"{p.mean_after:.4g}",
                ratio(p) + marks[0],
                f"{p.gain:+.2g} ± {p.margin:.2g}",
                *([ratio(last) + marks[1] if last else ""] if with_last else []),
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


def ratio(side: Paired) -> str:
    """The ratio of the means for people; a dash if there is none."""
    return "–" if math.isnan(side.ratio) else f"{side.ratio:.2f}"

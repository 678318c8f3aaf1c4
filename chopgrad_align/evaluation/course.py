"""The course of a run, from its `metrics.jsonl` and held-out measurements: panels of lines against the step.

`curves` and `svg` draw them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common.errors import UsageError
from ..objective.reading import Reading
from .heldout import paired_where_finite
from .measurement import Measurement

PHASES = ("data", "sampling", "decoding", "reward", "backward", "step")
WITNESS = "heldout/witness/"

Series = dict[str, np.ndarray]

_PLAIN = Reading()


@dataclass(frozen=True)
class Line:
    """A line, and behind it, if it is smoothed, what it is the average of."""

    label: str
    x: np.ndarray
    y: np.ndarray
    behind: np.ndarray | None = None


@dataclass(frozen=True)
class Points:
    """Held-out measurements, with the half width of an interval about each; NaN where there is none."""

    x: np.ndarray
    y: np.ndarray
    margin: np.ndarray


@dataclass(frozen=True)
class Panel:
    """A small plot against the step.

    Attributes:
        title: Of it, with the unit.
        lines: One colour each.
        points: Of held-out pairs.
        log: Whether its axis is logarithmic; all values are positive then.
        stacked: Whether each line is added to those before it.
        level: Of a horizontal line to compare with.
    """

    title: str
    lines: Sequence[Line] = ()
    points: Points | None = None
    log: bool = False
    stacked: bool = False
    level: float | None = None


def read_metrics(run: str | Path) -> tuple[Series, Series]:
    """Read `metrics.jsonl`: one object a line; a last line that was cut off is ignored.

    Returns:
        The training rows and the held-out rows, each by column: float arrays of one length, NaN where a row lacks the
        column, ordered by `step`. Of two rows for one step (a resumed run went over it again) the later one counts.

    Raises:
        UsageError: no such file, or a line of it that is not a row.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; give the folder of a run") from error
    training: dict[int, dict] = {}
    held_out: dict[int, dict] = {}
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line feed is empty, or was cut off
        try:
            row = json.loads(line)
            (held_out if any(key.startswith("heldout/") for key in row) else training)[int(row["step"])] = row
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"{path}, line {number}: expected a JSON object with a `step`; correct or delete it"
            ) from error
    return _columns(training), _columns(held_out)


def _columns(rows: dict[int, dict]) -> Series:
    ordered = [rows[step] for step in sorted(rows)]
    keys = dict.fromkeys(key for row in ordered for key, value in row.items() if isinstance(value, int | float))
    return {key: np.array([row.get(key) for row in ordered], dtype=float) for key in keys}  # None becomes NaN


def smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over a fifteenth of the run, unbiased at the start; NaN counts as missing."""
    decay = 1 - 1 / max(1.0, len(values) / 15)
    total = weight = 0.0
    out = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        total, weight = total * decay, weight * decay
        if np.isfinite(value):
            total, weight = total + value, weight + 1
        if weight:
            out[i] = total / weight
    return out


def panels(
    training: Series, held_out: Series, measured: Sequence[Measurement], readings: Mapping[str, Mapping]
) -> list[Panel]:
    """Panels of each term as people read it, of their sum if there are several, and of how the training went.

    Args:
        training, held_out: Of `read_metrics`.
        measured: What the held-out rows are the means of, as far as it is known; gives them intervals.
        readings: Of terms, as `heldout.json` has them.
    """
    keys = [key.removesuffix("/score") for key in training if key.endswith("/score")]
    keys += [k.removeprefix("heldout/") for k in held_out if k.startswith("heldout/") and not k.startswith(WITNESS)]
    terms = [key for key in dict.fromkeys(keys) if key not in ("reward_mean", "reward_stderr")]
    found = [_term(name, training, held_out, measured, Reading.of(readings, name)) for name in terms]
    if len(terms) != 1:
        lines = [_smooth(training, "reward")] if "reward" in training else []
        points = _points(held_out, "heldout/reward_mean", [m.objective for m in measured], measured, _PLAIN)
        found.append(Panel("objective", lines, points))
    norm = training.get("grad_norm")
    if norm is not None:
        log = bool(np.nanmin(norm, initial=np.inf) > 0)
        found.append(Panel("gradient norm", [_smooth(training, "grad_norm")], log=log))
    if "learning_rate" in training:
        found.append(Panel("learning rate", [Line("", training["step"], training["learning_rate"])]))
    phases = [phase for phase in PHASES if f"seconds/{phase}" in training]
    if phases:
        seconds = [np.nan_to_num(smoothed(training[f"seconds/{phase}"])) for phase in phases]
        lines = [Line(phase, training["step"], y) for phase, y in zip(phases, seconds, strict=True)]
        found.append(Panel("seconds a step", lines, stacked=True))
    if "peak_memory_gib" in training:
        found.append(Panel("peak memory, GiB", [Line("", training["step"], training["peak_memory_gib"])]))
    return [panel for panel in found if panel.lines or panel.points]


def witness_panel(held_out: Series) -> Panel | None:
    """Panel of the witnesses' means relative to the base model's; one that was not positive at first is left out."""
    names = [key for key in held_out if key.startswith(WITNESS) and held_out[key][0] > 0]
    lines = [Line(key.removeprefix(WITNESS), held_out["step"], held_out[key] / held_out[key][0]) for key in names]
    return Panel("witnesses, relative to the base model", lines, level=1.0) if lines else None


def _smooth(training: Series, key: str, reading: Reading = _PLAIN) -> Line:
    values = reading.offset + reading.scale * training[key]
    return Line("training, smoothed", training["step"], smoothed(values), values)


def _term(name: str, training: Series, held_out: Series, measured: Sequence[Measurement], reading: Reading) -> Panel:
    lines = [_smooth(training, f"{name}/score", reading)] if f"{name}/score" in training else []
    points = _points(held_out, f"heldout/{name}", [m.terms.get(name, []) for m in measured], measured, reading)
    return Panel(f"{name}, {reading.unit}" if reading.unit else name, lines, points)


def _points(
    held_out: Series, key: str, scores: Sequence[Sequence[float]], measured: Sequence[Measurement], reading: Reading
) -> Points | None:
    """The means in the rows, each with the interval of its difference to the first one, pair by pair."""
    if key not in held_out:
        return None
    margins = {}
    for measurement, values in zip(measured[1:], scores[1:], strict=True):
        change = paired_where_finite(scores[0], values, measurement.conditions) if scores[0] and values else None
        margins[measurement.step] = abs(reading.scale) * change.margin if change else math.nan
    steps = held_out["step"]
    means = reading.offset + reading.scale * held_out[key]
    return Points(steps, means, np.array([margins.get(int(step), math.nan) for step in steps]))

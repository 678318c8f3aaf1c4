"""Means over clips with their standard errors, and the table of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

TARGET = "target"  # as a method: what the metrics say of a perfect result; not one of the competitors


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error (sample standard deviation divided by √count), and of how many clips."""

    mean: float
    stderr: float
    count: int

    def __str__(self) -> str:
        return self.text("")

    def text(self, sign: str) -> str:
        """Rounded to the second digit of the standard error, or to four digits without one; `sign` may be `+`.

        A standard error of rounding alone, a millionth of the mean, is not worth mentioning.
        """
        if math.isnan(self.mean):
            return "–"
        if not (math.isfinite(self.mean) and self.stderr > 1e-6 * abs(self.mean)):
            return f"{self.mean:{sign}.4g}"
        largest = max(abs(self.mean), self.stderr)
        if largest < 1e-3:
            exponent = math.floor(math.log10(largest))
            scaled = Estimate(self.mean / 10**exponent, self.stderr / 10**exponent, self.count)
            return f"({scaled.text(sign)})e{exponent:03}"
        places = max(1 - math.floor(math.log10(self.stderr)), 0)
        return f"{self.mean:{sign}.{places}f} ± {self.stderr:.{places}f}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the values that are numbers; NaN where there are too few for it."""
    numbers = [value for value in values if not math.isnan(value)]
    mean = fmean(numbers) if numbers else math.nan
    known = len(numbers) > 1 and all(map(math.isfinite, numbers))
    return Estimate(mean, stdev(numbers) / math.sqrt(len(numbers)) if known else math.nan, len(numbers))


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Estimate:
    """Mean and standard error of `value - reference`, clip by clip, of the clips that have both."""
    return estimate([a - b for a, b in zip(values, reference, strict=True)])


@dataclass(frozen=True)
class Cell:
    """A figure of the table, and whether it is the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table with a row for each method and a column for each metric."""

    metrics: list[str]
    """With an arrow in the direction that is better."""
    rows: list[tuple[str, list[Cell]]]
    differences: list[tuple[str, list[Cell]]]
    """To the reference, of the other methods."""
    reference: str
    clips: int
    notes: list[str]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [f"Mean ± standard error over {self.clips} clips; the best in bold.", ""]
        lines += _markdown("method", self.metrics, self.rows)
        if self.differences:
            lines += ["", f"Difference to {self.reference}, clip by clip: mean ± standard error.", ""]
            lines += _markdown("method", self.metrics, self.differences)
        lines += [line for note in self.notes for line in ("", note)]
        return "\n".join(lines) + "\n"


def make_table(
    values: Mapping[str, Mapping[str, Sequence[float]]],
    of_sets: Mapping[str, Mapping[str, float]],
    higher_is_better: Mapping[str, bool],
    reference: str,
    clips: int,
    notes: Sequence[str],
) -> Table:
    """Lay the figures out.

    Args:
        values: For each method and each metric of clips the value of every clip.
        of_sets: For each method and each metric of sets its one value.
        higher_is_better: For each metric, in the order of the columns.
        reference: The method that the others are compared with.
        clips: How many there are.
        notes: Sentences below the table.
    """
    methods, metrics = list(values), list(higher_is_better)
    means: dict[str, dict[str, Estimate]] = {}
    gains: dict[str, dict[str, Estimate]] = {}
    for method in methods:
        alone = {metric: Estimate(value, math.nan, 1) for metric, value in of_sets[method].items()}
        means[method] = {metric: estimate(of_clips) for metric, of_clips in values[method].items()} | alone
        base = values[reference]
        gains[method] = {metric: paired_difference(v, base[metric]) for metric, v in values[method].items()}
        gains[method] |= {m: Estimate(e.mean - of_sets[reference][m], math.nan, 1) for m, e in alone.items()}
    best = {metric: _best([means[m][metric].mean for m in methods if m != TARGET], higher_is_better[metric])
            for metric in metrics}  # fmt: skip
    rows = [
        (m, [Cell(str(means[m][k]), m != TARGET and len(methods) > 1 and means[m][k].mean == best[k]) for k in metrics])
        for m in methods
    ]
    differences = [(m, [Cell(gains[m][k].text("+")) for k in metrics]) for m in methods if m != reference]
    partly = sorted({k for m in methods for k, v in values[m].items() if any(map(math.isnan, v))})
    notes = [*notes, *(f"{k}: not defined for some clips, which are left out of its means." for k in partly)]
    heads = [f"{metric} {'↑' if higher_is_better[metric] else '↓'}" for metric in metrics]
    return Table(heads, rows, differences, reference, clips, notes)


def _best(means: Sequence[float], higher: bool) -> float:
    numbers = [mean for mean in means if not math.isnan(mean)]
    return (max if higher else min)(numbers, default=math.nan)


def _markdown(corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> list[str]:
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, cells in rows:
        lines.append(f"| {name} | " + " | ".join(f"**{c.text}**" if c.best else c.text for c in cells) + " |")
    return lines

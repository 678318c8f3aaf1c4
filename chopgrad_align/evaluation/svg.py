"""Panels and sparklines as inline SVG, whose colours are the page's (`page.html`), so that they follow dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape
from matplotlib.ticker import LogLocator, MaxNLocator

from .course import Line, Panel, Points
from .witnesses import Bounds

_WIDTH, _HEIGHT = 380, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 374, 8, 166  # edges of the plot inside it
_MOST = 300  # points of a line; more are averaged
COLOURS = 6  # --c0 … --c5 of the page


class _Axis:
    """A linear or logarithmic axis from a range of values to pixels.

    Args:
        values: Everything on it.
        low, high: Pixels.
        log: Whether it is logarithmic.
        margin: Room beyond the values, as a part of their range.
    """

    def __init__(self, values: np.ndarray, low: float, high: float, log: bool = False, margin: float = 0.06) -> None:
        values = values[np.isfinite(values)]
        least, most = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        self._log, self._low, self._high = log, low, high
        a, b = self._scaled(least), self._scaled(most)
        room = margin * (b - a) or (0.0 if margin == 0 and b > a else max(abs(b), 1e-12) * 0.1)
        self._from, self._to = a - room, b + room

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        part = (self._scaled(value) - self._from) / ((self._to - self._from) or 1.0)
        return self._low + part * (self._high - self._low)

    def ticks(self, most: int, whole: bool = False) -> list[float]:
        """Round values inside, at most so many."""
        if self._log and self._to - self._from > 0.5:
            found = LogLocator(subs=(1, 2, 5) if self._to - self._from < 2 else (1,), numticks=most).tick_values(
                10**self._from, 10**self._to
            )
        else:
            ends = (10**self._from, 10**self._to) if self._log else (self._from, self._to)
            found = MaxNLocator(most, integer=whole, steps=[1, 2, 2.5, 5, 10]).tick_values(*ends)
        return [float(v) for v in found if (v > 0 or not self._log) and self._from <= self._scaled(v) <= self._to]


def panel_svg(panel: Panel, chosen: int | None = None, last: int | None = None) -> Markup:
    """Draw a panel.

    Args:
        panel: What to draw.
        chosen: Step whose weights were exported, to be marked.
        last: Where the axis ends at least, so that all panels of a run have the same.
    """
    lines = _stacked(panel.lines) if panel.stacked else panel.lines
    xs = [line.x for line in lines] + ([panel.points.x] if panel.points else [])
    ys = [a for line in lines for a in (line.y, line.behind) if a is not None] + ([np.zeros(1)] * panel.stacked)
    if panel.points:
        margin = np.nan_to_num(panel.points.margin)
        ys += [panel.points.y - margin, panel.points.y + margin]
    x = _Axis(np.concatenate([*xs, np.array([0.0, last or 0])]), _LEFT, _RIGHT, margin=0.0)
    y = _Axis(np.concatenate(ys), _BOTTOM, _TOP, panel.log, margin=0.0 if panel.stacked else 0.06)
    parts = [*_grid(x, y)]
    if chosen is not None:
        at = f"{x(chosen):.1f}"
        parts.append(f'<line class="chosen" x1="{at}" x2="{at}" y1="{_TOP}" y2="{_BOTTOM}"/>')
    for i, line in reversed([*enumerate(lines)]):
        parts += _area(line, i, x, y) if panel.stacked else _line(line, i, x, y)
    if panel.points:
        parts += _marks(panel.points, x, y)
    label = escape(f"{panel.title} against the training step")
    return Markup(
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )


def sparkline_svg(steps: Sequence[float], ratios: Sequence[float], bounds: Bounds | None) -> Markup:
    """Draw a witness's ratio to the base model over the run as one small line, in front of the band of its bounds."""
    width, height = 120, 26
    values = np.array([*ratios, 1.0])
    span = max(np.nanmax(np.abs(values - 1)) * 1.1, 0.1) if np.isfinite(values).any() else 0.1
    x = _Axis(np.array(steps, dtype=float), 3, width - 3, margin=0.0)
    y = _Axis(np.array([1 - span, 1 + span]), height - 2, 2, margin=0.0)
    parts = []
    if bounds is not None:
        top, bottom = (min(max(y(edge), 0), height) for edge in (min(bounds.most, 1e6), bounds.least))
        parts.append(f'<rect class="band" x="0" width="{width}" y="{top:.1f}" height="{bottom - top:.1f}"/>')
    points = [(x(s), y(r), r) for s, r in zip(steps, ratios, strict=True) if math.isfinite(r)]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in points)
    parts.append(f'<line class="level" x1="0" x2="{width}" y1="{y(1):.1f}" y2="{y(1):.1f}"/>')
    parts.append(f'<polyline class="spark" points="{path}"/>')
    for a, b, ratio in points:
        out = bounds is not None and ratio not in bounds
        if out or (a, b, ratio) == points[-1]:
            parts.append(f'<circle class="{"breach" if out else "end"}" cx="{a:.1f}" cy="{b:.1f}" r="2.2"/>')
    return Markup(
        f'<svg class="sparkline" viewBox="0 0 {width} {height}" role="img" aria-label="ratio over the steps">'
        f"{''.join(parts)}</svg>"
    )


def _grid(x: _Axis, y: _Axis) -> list[str]:
    parts = []
    for value in y.ticks(4):
        at = y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in x.ticks(5, whole=True):
        # The first and the last label must not stick out.
        parts.append(
            f'<text x="{min(x(value), _RIGHT - 10):.1f}" y="{_BOTTOM + 17}" text-anchor="middle">{value:g}</text>'
        )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{_BOTTOM}" y2="{_BOTTOM}"/>')
    return parts


def _number(value: float) -> str:
    return f"{value:.4g}".replace("e-0", "e-").replace("-", "−")


def _line(line: Line, colour: int, x: _Axis, y: _Axis) -> list[str]:
    parts = []
    if line.behind is not None:
        parts.append(f'<path class="behind s{colour % COLOURS}" d="{_path(line.x, line.behind, x, y)}"/>')
    parts.append(f'<path class="line s{colour % COLOURS}" d="{_path(line.x, line.y, x, y)}"/>')
    return parts


def _area(line: Line, colour: int, x: _Axis, y: _Axis) -> list[str]:
    outline = _path(line.x, line.y, x, y)
    if not outline:
        return []
    ends = [f"{x(line.x[i]):.1f},{y(0):.1f}" for i in (-1, 0)]
    return [f'<path class="area f{colour % COLOURS}" d="{outline}L{ends[0]}L{ends[1]}Z"/>']


def _stacked(lines: Sequence[Line]) -> list[Line]:
    sums = np.cumsum([line.y for line in lines], axis=0)
    return [Line(line.label, line.x, total) for line, total in zip(lines, sums, strict=True)]


def _path(steps: np.ndarray, values: np.ndarray, x: _Axis, y: _Axis) -> str:
    """SVG path through the finite values, pen up where one is missing; long lines are averaged in pieces."""
    if len(steps) > _MOST:
        pieces = np.array_split(np.arange(len(steps)), _MOST)
        steps = np.array([steps[piece].mean() for piece in pieces])
        values = np.array([values[piece].mean() for piece in pieces])
    out, pen = [], "M"
    for step, value in zip(steps, values, strict=True):
        if math.isfinite(value):
            out.append(f"{pen}{x(step):.1f},{y(value):.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(out)


def _marks(points: Points, x: _Axis, y: _Axis) -> list[str]:
    parts = []
    for step, value, margin in zip(points.x, points.y, points.margin, strict=True):
        if not math.isfinite(value):
            continue
        at, words = f"{x(step):.1f}", f"held out, step {step:.0f}: {value:.4g}"
        if math.isfinite(margin):
            parts.append(
                f'<line class="bar" x1="{at}" x2="{at}" y1="{y(value - margin):.1f}" y2="{y(value + margin):.1f}"/>'
            )
            words += f", 95 % interval of the change ± {margin:.2g}"
        parts.append(f'<circle class="mark" cx="{at}" cy="{y(value):.1f}" r="3"><title>{words}</title></circle>')
    return parts

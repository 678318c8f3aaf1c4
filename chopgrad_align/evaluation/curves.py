"""The course of a run as one picture, drawn from its `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ..common.errors import UsageError
from ..common.files import whole_file

# The first colours are Okabe and Ito's, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_PHASES = ("data", "sampling", "decoding", "reward", "backward", "step")
_HELD_OUT = "#111111"
_WITNESS = "heldout/witness/"
_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8.5}

Series = dict[str, np.ndarray]


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


def draw_curves(run: str | Path) -> Path:
    """Draw `curves.png` in a run folder, against the step: reward, its terms, witnesses, gradient norm and seconds.

    What the metrics lack is left out.

    Raises:
        UsageError: no metrics, or a folder that cannot be written to.
    """
    training, held_out = read_metrics(run)
    panels: list[tuple[str, Callable[[Axes], None]]] = []
    if "reward" in training or "heldout/reward_mean" in held_out:
        panels.append(("reward", lambda axes: _draw_reward(axes, training, held_out)))
    for index, key in enumerate(key for key in training if key.endswith("/score")):
        term = key.removesuffix("/score")
        panels.append(
            (term, lambda axes, k=key, t=term, i=index: _draw_term(axes, training, held_out, k, t, i))  # type: ignore[misc]
        )
    if any(key.startswith(_WITNESS) for key in held_out):
        panels.append(("witnesses, relative to the base model", lambda axes: _draw_witnesses(axes, held_out)))
    if "grad_norm" in training:
        panels.append(("gradient norm", lambda axes: _draw_gradient(axes, training)))
    if any(key.startswith("seconds/") for key in training):
        panels.append(("seconds a step", lambda axes: _draw_seconds(axes, training)))
    if not panels:
        raise UsageError(f"{Path(run) / 'metrics.jsonl'} has nothing to draw yet; let the run take a step")

    columns = min(len(panels), 2 if len(panels) <= 4 else 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: its global state is not safe beside a user's own figures
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, draw) in zip(grid, panels, strict=False):
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color="#333333")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color("#999999")
        axes.tick_params(colors="#444444", labelsize=9)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        draw(axes)
        axes.margins(x=0.02)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("step", fontsize=9, color="#444444")

    path = Path(run) / "curves.png"
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130)
    return path


def _draw_line(axes: Axes, training: Series, key: str, colour: str, label: str | None = None) -> None:
    if key in training:
        axes.plot(training["step"], training[key], color=colour, alpha=0.25, linewidth=0.9)
        axes.plot(training["step"], smoothed(training[key]), color=colour, linewidth=1.9, label=label)


def _draw_reward(axes: Axes, training: Series, held_out: Series) -> None:
    _draw_line(axes, training, "reward", _COLOURS[0], "training, smoothed")
    if "heldout/reward_mean" in held_out:
        error = held_out.get("heldout/reward_stderr")
        style: dict[str, Any] = {
            "fmt": "o",
            "color": _HELD_OUT,
            "markersize": 4.5,
            "capsize": 3,
            "linewidth": 1.2,
            "zorder": 3,
        }
        axes.errorbar(held_out["step"], held_out["heldout/reward_mean"], error, label="held out ± s.e.", **style)
    axes.legend(**_LEGEND)


def _draw_term(axes: Axes, training: Series, held_out: Series, key: str, term: str, index: int) -> None:
    _draw_line(axes, training, key, _COLOURS[(1 + index) % len(_COLOURS)])
    if f"heldout/{term}" in held_out:
        axes.plot(held_out["step"], held_out[f"heldout/{term}"], "o", color=_HELD_OUT, markersize=4.5, label="held out")
        axes.legend(**_LEGEND)


def _draw_witnesses(axes: Axes, held_out: Series) -> None:
    """Lines of the ratios; a witness that was not positive at first has none."""
    witnesses = [key for key in held_out if key.startswith(_WITNESS) and held_out[key][0] > 0]
    for i, key in enumerate(witnesses):
        style: dict[str, Any] = {
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": ("-", "--", ":")[i // len(_COLOURS) % 3],
        }
        ratios = held_out[key] / held_out[key][0]
        axes.plot(
            held_out["step"],
            ratios,
            marker="o",
            markersize=3.5,
            linewidth=1.4,
            label=key.removeprefix(_WITNESS),
            **style,
        )
    axes.axhline(1, color="#999999", linewidth=0.8)
    if witnesses:
        low, high = axes.dataLim.intervaly
        axes.set_ylim(low - 0.05 * (high - low), high + 0.45 * (high - low) + 1e-3)  # room for the legend
        axes.legend(**_LEGEND, loc="upper center", ncols=4, columnspacing=1.2, handlelength=1.6)


def _draw_gradient(axes: Axes, training: Series) -> None:
    _draw_line(axes, training, "grad_norm", "#666666")
    if np.nanmin(training["grad_norm"], initial=np.inf) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def _draw_seconds(axes: Axes, training: Series) -> None:
    phases = [phase for phase in _PHASES if f"seconds/{phase}" in training]
    heights = [np.nan_to_num(smoothed(training[f"seconds/{phase}"])) for phase in phases]
    axes.stackplot(training["step"], heights, labels=phases, colors=_COLOURS, alpha=0.85, linewidth=0)
    axes.set_ylim(0, 1.2 * axes.dataLim.y1)  # room for the legend above the stack
    axes.legend(**_LEGEND, loc="upper center", ncols=len(phases), columnspacing=1.2, handlelength=1.0)

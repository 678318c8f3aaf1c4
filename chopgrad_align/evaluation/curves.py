"""The course of a run as one picture, `curves.png`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ..common.errors import UsageError
from ..common.files import whole_file
from .course import Panel, panels, read_metrics, witness_panel
from .measurement import read_measurements
from .run_files import read_json

# The first colours are Okabe and Ito's, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_HELD_OUT = "#111111"
_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8.5}


def draw_curves(run: str | Path) -> Path:
    """Draw `curves.png` in a run folder, against the step: terms, witnesses, gradient norm, seconds and the like.

    What the metrics lack is left out.

    Raises:
        UsageError: no metrics, or a folder that cannot be written to.
    """
    run = Path(run)
    training, held_out = read_metrics(run)
    readings: Mapping = (read_json(run / "heldout.json", dict) or {}).get("readings", {})
    found = panels(training, held_out, read_measurements(run / "heldout"), readings)
    found += [panel] if (panel := witness_panel(held_out)) else []
    if not found:
        raise UsageError(f"{run / 'metrics.jsonl'} has nothing to draw yet; let the run take a step")

    columns = min(len(found), 2 if len(found) <= 4 else 3)
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: its global state is not safe beside a user's own figures
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, found, strict=False):
        axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", color="#333333")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color("#999999")
        axes.tick_params(colors="#444444", labelsize=9)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        _draw(axes, panel)
        axes.margins(x=0.02)
    for axes in grid[len(found) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(found) - columns) : len(found)]:
        axes.set_xlabel("step", fontsize=9, color="#444444")

    path = run / "curves.png"
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130)
    return path


def _draw(axes: Axes, panel: Panel) -> None:
    if panel.stacked:
        labels, heights = [line.label for line in panel.lines], [line.y for line in panel.lines]
        axes.stackplot(panel.lines[0].x, heights, labels=labels, colors=_COLOURS, alpha=0.85, linewidth=0)
    else:
        _draw_lines(axes, panel)
    if (points := panel.points) is not None:
        axes.errorbar(
            points.x,
            points.y,
            np.nan_to_num(points.margin),
            label="held out, 95 % interval of the change",
            fmt="o",
            color=_HELD_OUT,
            markersize=4.5,
            capsize=3,
            linewidth=1.2,
            zorder=3,
        )
    if panel.level is not None:
        axes.axhline(panel.level, color="#999999", linewidth=0.8)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    if len(panel.lines) > 1:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.45 * (high - low))  # room for the legend
        axes.legend(**_LEGEND, loc="upper center", ncols=4, columnspacing=1.2, handlelength=1.6)
    elif panel.points is not None:
        axes.legend(**_LEGEND)


def _draw_lines(axes: Axes, panel: Panel) -> None:
    for i, line in enumerate(panel.lines):
        style: dict[str, Any] = {
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": ("-", "--", ":")[i // len(_COLOURS) % 3],
            "label": line.label or None,
        }
        if line.behind is not None:
            axes.plot(line.x, line.behind, color=style["color"], alpha=0.25, linewidth=0.9)
        axes.plot(line.x, line.y, linewidth=1.9 if line.behind is not None else 1.4, **style)

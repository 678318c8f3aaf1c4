"""The curves as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from ..common.files import whole_file
from .peers import PEERS
from .rows import EXACT

# Okabe and Ito's, which the colour-blind tell apart.
_EXACT, _TRUNCATED, _PEER, _FULL, _LORA = "#0072B2", "#D55E00", "#777777", "#111111", "#009E73"
_MARKERS = "osD^vP*X"
_MIB = 2**20


def draw_memory(memory: dict[str, Any], path: Path) -> None:
    """Curve (a): one line a policy, against the number of frames."""
    figure = _figure(8.6, 4.6)
    axes = _axes(figure.subplots(), "Memory of decode and backward", "frames of the clip", "peak memory (MiB)")
    drawn = [name for name in memory["peak_bytes"] if "memory_efficient_layers=" not in name]  # the table has them all
    names = sorted(drawn, key=lambda name: -(memory["peak_bytes"][name][-1] or np.inf))
    for name in names:
        number = [other for other in names if _colour(other) == _colour(name)].index(name)
        peaks = [np.nan if peak is None else peak / _MIB for peak in memory["peak_bytes"][name]]
        style: dict[str, Any] = {"color": _colour(name), "marker": _MARKERS[number % len(_MARKERS)]}
        axes.plot(memory["frames"], peaks, label=name, markersize=5.5, linewidth=1.6, alpha=0.9, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(memory["frames"], [str(count) for count in memory["frames"]])
    axes.xaxis.set_minor_locator(NullLocator())
    _logarithmic(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8.5, title="highest first")
    _save(figure, path)


def draw_influence(influence: dict[str, Any], path: Path) -> None:
    """Curve (b): one set of points a clip, and the exponential."""
    figure = _figure(6.4, 4.2)
    label = "RMS change of a pixel\nfor unit noise on the latents"
    axes = _axes(figure.subplots(), "Influence of a latent group on later frames", "temporal distance (groups)", label)
    fit = influence["fit"]
    for number, (name, curve) in enumerate(influence["influence"].items()):
        style: dict[str, Any] = {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 5.5, "alpha": 0.8}
        axes.plot(range(len(curve)), curve, linestyle="none", label=name, color=f"C{number}", **style)
    length = max(map(len, influence["influence"].values()))
    distance = np.linspace(0, length - 1, 50)
    text = f"fit: {fit['scale']:.2g} · {fit['factor']:.2f}$^{{distance}}$, R² = {fit['r_squared']:.3f}"
    fitted = fit["scale"] * fit["factor"] ** distance
    axes.plot(distance, fitted, color=_FULL, linewidth=1.3, linestyle="--", label=text)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def draw_error(results: dict[str, Any], path: Path) -> None:
    """Curve (c): median and range over the cases, at the latents and at the LoRA's weights."""
    distances = results["settings"]["distances"]
    names = [f"Truncated({distance})" for distance in distances] + [EXACT]
    figure = _figure(9.6, 4.0)
    cosine, error = figure.subplots(1, 2)
    _axes(cosine, "Cosine to the exact gradient", "truncation distance D (groups)", "cosine")
    _axes(error, "Relative error", "truncation distance D (groups)", "|gradient − exact| / |exact|")
    kinds = [("error", "at the latents", _EXACT, "o"), ("lora_error", "at the LoRA's weights", _LORA, "s")]
    for axes, key in ((cosine, "cosine"), (error, "relative_error")):
        for number, (kind, label, colour, marker) in enumerate(kinds):
            if kind not in results:
                continue
            values = np.array([results[kind][key][name] for name in names]).T  # (cases, names)
            middle, low, high = np.median(values, 0), values.min(0), values.max(0)
            place = np.arange(len(names)) + (number - 0.5) * 0.12
            spread = np.stack([middle - low, high - middle])
            axes.errorbar(place, middle, spread, color=colour, marker=marker, capsize=3, linewidth=1.5, label=label)
        axes.set_xticks(range(len(names)), [*map(str, distances), "Exact"])
    cosine.axhline(1, color="#999999", linewidth=0.8, zorder=0)
    error.set_ylim(bottom=0)
    cosine.legend(frameon=False, fontsize=9, loc="lower right", title="median and range of the cases")
    _save(figure, path)


def draw_ways(results: dict[str, Any], path: Path) -> None:
    """Cosine, memory and time of the policies and of other projects' ways, side by side."""
    speeds, peaks, cosines = results["speed"], results["memory"]["of_clip"], results["error"]["cosine"]
    names = names_of(speeds)[::-1]
    place = np.arange(len(names))
    colours = [_colour(name) for name in names]
    figure = _figure(8.5 + 3 * len(speeds), 0.7 + 0.29 * len(names))
    left, middle, *right = figure.subplots(1, 2 + len(speeds), sharey=True)
    _axes(left, "Cosine to the exact gradient", "cosine: median and range of the cases", "")
    height, width = results["settings"]["size"]
    _axes(middle, f"Memory, {height}x{width}", "peak (MiB)", "")
    for axes, size in zip(right, speeds, strict=True):
        _axes(axes, f"Time, {size}", "ratio to plain autograd", "")
    for at, name, colour in zip(place, names, colours, strict=True):
        if values := cosines.get(name):
            left.plot([min(values), max(values)], [at, at], color=colour, linewidth=2.5, solid_capstyle="round")
            left.plot(np.median(values), at, "o", color=colour, markersize=6)
        if peak := peaks.get(name):
            middle.barh(at, peak / _MIB, color=colour, height=0.6)
            middle.annotate(f"{peak / _MIB:.0f}", (peak / _MIB, at), (3, 0), textcoords="offset points", **_SMALL)
        for axes, speed in zip(right, speeds.values(), strict=True):
            ratio = speed["ratio"][name]
            axes.barh(at, ratio, color=colour, height=0.6)
            axes.annotate(f"{ratio:.2f}", (ratio, at), (3, 0), textcoords="offset points", **_SMALL)
            if goal := speed["goal"].get(name):
                axes.plot([goal, goal], [at - 0.42, at + 0.42], color="#CC0000", linewidth=2)
    right[-1].plot([], [], color="#CC0000", linewidth=2, label="goal: at most")
    if next(iter(speeds.values()))["goal"]:
        right[-1].legend(frameon=False, fontsize=8.5, loc="upper right")
    left.set_yticks(place, names)
    left.set_xlim(min(0, *map(min, cosines.values())) - 0.02, 1.03)
    for axes in (left, middle, *right):
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        axes.grid(axis="y", visible=False)
        axes.set_ylim(-0.6, len(names) - 0.4)
    for axes in (middle, *right):
        axes.margins(x=0.12)
    _save(figure, path)


def names_of(speeds: dict[str, Any]) -> list[str]:
    """Every way that was timed, in the order of the tables."""
    return list(next(iter(speeds.values()))["ratio"])


_SMALL: dict[str, Any] = {
    **{"fontsize": 8, "va": "center", "color": "#333333"},
    **{"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.6}, "zorder": 3},  # above a goal's line
}


def _colour(name: str) -> str:
    if name in PEERS:
        return _PEER
    if name.startswith("Exact"):
        return _EXACT
    return _TRUNCATED if name.startswith("Truncated") else _FULL


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: its global state is not safe beside a user's own figures
    return figure


def _axes(axes: Axes, title: str, x: str, y: str) -> Axes:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color="#333333")
    axes.set_xlabel(x, fontsize=9.5)
    axes.set_ylabel(y, fontsize=9.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color("#999999")
    axes.tick_params(colors="#444444", labelsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)

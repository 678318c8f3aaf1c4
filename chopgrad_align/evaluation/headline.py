"""The head of a run's page: what came out, in numbers for people, and the run in a line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..objective.reading import Reading
from .changes import Change
from .figures import before_and_after, duration, p_value
from .heldout import paired_where_finite
from .run_files import RunFiles

_MEANING = {"same": "not significant", "other": "significant", "better": "better", "worse": "worse"}
_DIRECTION = {"higher": "higher is better", "lower": "lower is better", "": ""}


@dataclass(frozen=True)
class Headline:
    """A term of the objective, before and after, as texts."""

    name: str
    unit: str
    direction: str
    verdict: str
    before: str
    after: str
    gain: str
    interval: str
    note: str


def headlines(run: RunFiles, rows: Sequence[Change]) -> list[Headline]:
    """Each term of the objective and, if there is not just one, their weighted sum.

    Args:
        run: Of which they are.
        rows: Its changes.
    """
    terms = [row for row in rows if row.trained]
    found = [_headline(row, run.terms[row.name], run) for row in terms]
    if len(terms) != 1 and "after" in run.held_out:
        before, after = run.scores("before"), run.scores("after")
        conditions = run.held_out.get("conditions") or range(len(before))
        if compared := paired_where_finite(before, after, conditions):
            found.append(_headline(Change("objective", True, compared, reading=Reading()), run.held_out, run))
    return found


def _headline(row: Change, sides: Mapping[str, Any], run: RunFiles) -> Headline:
    p = row.after
    side, verb = (1, "rose") if p.gain >= 0 else (-1, "fell")
    pairs = zip(run.scores("before", sides), run.scores("after", sides), strict=True)
    moved = sum(side * (row.reading(after) - row.reading(before)) > 0 for before, after in pairs)
    note = f"{_MEANING[row.verdict]}, p = {p_value(p.p_value)}; {moved} of {p.count} pairs {verb} (n = {p.sample})"
    texts = before_and_after(p)
    return Headline(row.name, row.reading.unit, _DIRECTION[row.reading.better], row.verdict, *texts, note)


def verdict(run: RunFiles, rows: Sequence[Change]) -> tuple[str, bool]:
    """A sentence about the bounds of the exported model's witnesses, and whether one is out of them."""
    at = "" if run.after is None else f" at step {run.after}"
    bounded = [row for row in rows if row.bounds and not math.isnan(row.after.ratio)]
    if breached := [row.name for row in bounded if row.breached(row.after)]:
        return f"out of bounds{at}: {', '.join(breached)}", True
    return f"all {len(bounded)} witnesses that have bounds are within them{at}" if bounded else "", False


def progress(run: RunFiles) -> str:
    """A sentence about a run that has not come to its end; one that ended early has said so in a remark."""
    if not (run.training or run.rows) or (run.held_out and not run.held_out.get("interim")):
        return ""
    measured = max(run.held_out.get("steps", {}).values(), default=0)
    last = f"held-out pairs were last measured at step {measured}" if measured else "not measured after training yet"
    return f"step {run.step}{f' of {run.steps}' if run.steps else ''}; {last}"


def model(run: RunFiles) -> str:
    """The name of the model; of a folder, its last two parts."""
    found = run.settings.get("model")
    name = str(found.get("name", "")) if isinstance(found, dict) else ""
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name


def facts(run: RunFiles) -> list[str]:
    """Steps, time and cost, memory, machine and versions."""
    found = []
    start = run.starts[-1] if run.starts else {}
    processes, _, device = str(start.get("processes", "")).partition(", ")
    count = int(processes) if processes.isdecimal() else 1
    if run.training:
        found.append(f"{run.step} steps" if run.steps in (None, run.step) else f"{run.step} of {run.steps} steps")
        seconds = sum(np.nansum(values) for key, values in run.training.items() if key.startswith("seconds/"))
        if seconds:
            kind = {"cuda": "GPU", "cpu": "CPU"}.get(device, "device")
            found.append(f"{duration(seconds)} of training ({seconds / 3600 * count:.2g} {kind} hours)")
        if "peak_memory_gib" in run.training:
            found.append(f"{np.nanmax(run.training['peak_memory_gib']):.2f} GiB peak memory")
    machine = str(start.get("gpu") or start.get("cpu", ""))
    found.append(f"{count} × {machine}" if machine and count > 1 else machine)
    if "chopgrad-align" in start:
        commit = f" ({start['commit'][:9]})" if "commit" in start else ""
        found.append(f"chopgrad-align {start['chopgrad-align']}{commit}")
    found += [f"{name} {start[name]}" for name in ("torch", "diffusers") if name in start]
    found.append(str(start.get("started", ""))[:16].replace("T", " "))
    return [fact for fact in found if fact]

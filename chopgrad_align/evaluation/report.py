"""A run as one page: `report.html`, self-contained, so that it can be opened from the disk, mailed and archived."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..common.errors import UsageError
from .changes import Change, changes
from .course import Panel, panels
from .figures import before_and_after
from .headline import facts, headlines, model, progress, verdict
from .page import write_page
from .run_files import RunFiles
from .samples import find_samples
from .shown_samples import score, shown_samples
from .svg import panel_svg, sparkline_svg


@dataclass(frozen=True)
class _Row:
    """A row of the table of changes, as texts."""

    change: Change
    before: str
    after: str
    gain: str
    interval: str
    spark: Markup


def write_report(run: str | Path) -> Path:
    """Write `report.html` into a run folder, from what the folder holds; every part may be missing.

    Read are `heldout.json` and `heldout/step-NNNNNN.json`, `metrics.jsonl`, `samples/`, `config.yaml` and
    `environment.json` (an object, or a list with one for each start of the run). So a run that was killed, or that
    still trains, has a report of what it has measured so far.

    The videos in it are smaller and more compressed than in the folder, all of them together 20 MB at most.

    Raises:
        UsageError: no such folder, a file in it that is not what its name says, or the page cannot be written.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise UsageError(f"there is no run folder {folder}; give the folder that a training run wrote")
    files = RunFiles(folder)
    rows = changes(files.held_out)
    gains = [after - before for before, after in zip(files.scores("before"), files.scores("after"), strict=True)]
    samples = find_samples(folder / "samples", gains, files.after)
    groups, courses = shown_samples(files, samples)
    sentence, breached = verdict(files, rows)
    # Worth a mark only if it is not the last one.
    exported = files.after if "last" in files.held_out.get("steps", {}) else None
    last = max([files.step, *(measurement.step for measurement in files.measured)])
    path = folder / "report.html"
    write_page(
        path,
        "report.html",
        model=model(files),
        facts=facts(files),
        command=files.starts[-1].get("command", "") if files.starts else "",
        headlines=headlines(files, rows),
        progress=progress(files),
        verdict=sentence,
        breached=breached,
        remarks=files.held_out.get("remarks", []),
        watched=[row for row in rows if not row.trained],
        groups=groups,
        recorded=_recorded(len(samples), len(gains), sum(len(pairs) for _, pairs in groups)),
        courses=courses,
        exported=exported,
        table=[_row(files, row) for row in rows],
        with_last=any(row.last for row in rows),
        by_condition=any(row.after.conditions != row.after.count for row in rows),
        course=[
            (panel, _legend(panel), panel_svg(panel, exported, last))
            for panel in panels(files.training, files.rows, files.measured, files.readings)
        ],
        pairs=_pairs(files),
        terms=list(files.terms),
        config=files.config,
        versions=_versions(files.starts),
    )
    return path


def _recorded(samples: int, pairs: int, shown: int) -> str:
    """Where the sample videos are, in words."""
    of = f"{samples} of {pairs} held-out pairs were recorded" if samples < pairs else f"all {samples} held-out pairs"
    return of + (f"; {shown} are in this page, the others in samples/" if shown < samples else "")


def _row(run: RunFiles, row: Change) -> _Row:
    spark, key = Markup(""), f"heldout/{'' if row.trained else 'witness/'}{row.name}"
    means = [measurement.row().get(key, math.nan) for measurement in run.measured]
    if len(means) > 2 and means[0] > 0 and not row.reading.unit:
        steps = [measurement.step for measurement in run.measured]
        spark = sparkline_svg(steps, [mean / means[0] for mean in means], row.bounds)
    return _Row(row, *before_and_after(row.after), spark)


def _legend(panel: Panel) -> list[tuple[str, str]]:
    """Swatches, and what they stand for."""
    several = len(panel.lines) > 1 or panel.points is not None
    found = [(f"s{i}", line.label) for i, line in enumerate(panel.lines) if line.label and several]
    return found + ([("dot", "held out")] if panel.points else [])


def _pairs(run: RunFiles) -> list[tuple[Any, ...]]:
    """Prompt, seed and the scores by term of each pair."""
    count = len(run.scores("after"))
    prompts, seeds = (run.held_out.get(key) or [""] * count for key in ("prompts", "seeds"))
    scores = ([score(run, name, sides, place) for name, sides in run.terms.items()] for place in range(count))
    return list(zip(prompts, seeds, scores, strict=True))


def _versions(starts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Names and values; of a value that differs between starts of the run, all in order."""
    each = {name: [str(start[name]) for start in starts if name in start] for start in starts for name in start}
    return {name: " → ".join(dict.fromkeys(values)) for name, values in each.items()}

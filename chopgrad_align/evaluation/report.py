"""A run as one page: `report.html`, self-contained, so that it can be opened from the disk, mailed and archived."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from ..common.errors import UsageError
from ..objective.reading import Reading
from .changes import Change, changes
from .course import Panel, panels, read_metrics
from .fused_video import fuse
from .heldout import Paired, paired_where_finite
from .measurement import Measurement, comparison, read_measurements
from .page import data_uri, write_page
from .run_files import read_json
from .samples import Sample, find_samples, grouped, spread, typical
from .svg import panel_svg, sparkline_svg
from .witnesses import Bounds

_MOST_PAIRS = 32  # in the page; the others stay in the folder
_MOST_STEPS = 8  # of a pair, through training
_VIDEO_BYTES = 15_000_000  # of all videos in the page; as text they are a third larger
_WIDTH, _WIDTH_OF_STEP = 416, 208  # pixels of one video in the page, at most


@dataclass(frozen=True)
class Headline:
    """A term of the objective, before and after, in numbers for people."""

    name: str
    unit: str
    better: str
    verdict: str
    before: str
    after: str
    gain: str
    interval: str
    note: str


@dataclass(frozen=True)
class Score:
    """A measure of one pair, before and after."""

    name: str
    before: str
    after: str
    gain: str
    verdict: str


@dataclass(frozen=True)
class Clip:
    """A video of the page, with a label and a note for each of the videos that are fused in it."""

    uri: str
    poster: str
    size: tuple[int, int]
    labels: list[str]
    notes: list[str]
    alt: str
    tiny: bool
    chosen: int | None = None


@dataclass(frozen=True)
class Pair:
    """A held-out pair of the page."""

    place: int
    prompt: str
    clip: Clip
    scores: list[Score]
    witnesses: list[tuple[str, str]]


@dataclass(frozen=True)
class Witnessed:
    """A witness or term of the table of changes."""

    change: Change
    before: str
    after: str
    gain: str
    interval: str
    spark: Markup


class _Run:
    """The files of a run that the page is made of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.measured: list[Measurement] = read_measurements(folder / "heldout")
        held_out = read_json(folder / "heldout.json", dict)
        if "after" not in (held_out or {}) and len(self.measured) > 1:  # of a run that was killed
            held_out = {**comparison(self.measured, self.measured[-1]), **(held_out or {})}
        self.held_out: dict[str, Any] = held_out or {}
        self.readings: Mapping[str, Any] = self.held_out.get("readings", {})
        self.training, self.rows = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else ({}, {})
        path = folder / "config.yaml"
        self.config = path.read_text(encoding="utf-8") if path.is_file() else ""
        try:
            settings = yaml.safe_load(self.config)
        except yaml.YAMLError:
            settings = None
        self.settings: dict[str, Any] = settings if isinstance(settings, dict) else {}
        found = read_json(folder / "environment.json", dict | list) or []
        self.starts = [start for start in (found if isinstance(found, list) else [found]) if isinstance(start, dict)]

    @property
    def step(self) -> int:
        """Steps that were taken."""
        return int(self.training["step"][-1]) if self.training else 0

    @property
    def after(self) -> int | None:
        """The step of the model after training, if it is known."""
        return self.held_out.get("steps", {}).get("after")

    @property
    def steps(self) -> int | None:
        """Steps that the run is to take."""
        found = self.settings.get("train")
        return found.get("steps") if isinstance(found, dict) else None

    def scores(self, side: str, of: Mapping[str, Any] | None = None) -> list[float]:
        """The objective of each pair, or a term or witness, before or after; NaN where it is not finite."""
        return [math.nan if v is None else v for v in (self.held_out if of is None else of).get(side, [])]


def write_report(run: str | Path) -> Path:
    """Write `report.html` into a run folder, from what the folder holds; every part may be missing.

    Read are `heldout.json` and `heldout/step-NNNNNN.json`, `metrics.jsonl`, `samples/`, `config.yaml` and
    `environment.json` (an object, or a list with one for each start of the run). So a run that was killed, or that
    still trains, has a report of what it has measured so far.

    Videos are in the page, smaller and more compressed than in the folder: all of them together 20 MB at most.

    Raises:
        UsageError: no such folder, a file in it that is not what its name says, or the page cannot be written.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise UsageError(f"there is no run folder {folder}; give the folder that a training run wrote")
    found = _Run(folder)
    rows = changes(found.held_out)
    before, after = found.scores("before"), found.scores("after")
    gains = [b - a for a, b in zip(before, after, strict=True)]
    samples = find_samples(folder / "samples", gains, found.after)
    groups, strips = _shown(found, samples)
    course = panels(found.training, found.rows, found.measured, found.readings)
    last = max(found.step, found.measured[-1].step if found.measured else 0)
    exported = found.after if found.held_out.get("steps", {}).get("last") is not None else None
    verdict, breached = _verdict(rows)
    path = folder / "report.html"
    write_page(
        path,
        "report.html",
        model=_model(found),
        progress=_progress(found),
        headlines=_headlines(found, rows, before, after),
        verdict=verdict,
        breached=breached,
        remarks=found.held_out.get("remarks", []),
        watched=[row for row in rows if not row.trained],
        facts=_facts(found),
        command=found.starts[-1].get("command", "") if found.starts else "",
        groups=groups,
        recorded=_recorded(len(samples), len(before), sum(len(pairs) for _, pairs in groups)),
        strips=strips,
        table=[_witnessed(found, row) for row in rows],
        with_last=any(row.last for row in rows),
        by_condition=bool(rows and rows[0].after.conditions != rows[0].after.count),
        course=[(panel, _legend(panel), panel_svg(panel, exported, last)) for panel in course],
        exported=exported,
        pairs=_pairs_table(found, rows),
        config=found.config,
        versions=_versions(found.starts),
    )
    return path


# --- head -------------------------------------------------------------------------------------------------------------


def _model(run: _Run) -> str:
    model = run.settings.get("model")
    name = str(model.get("name", "")) if isinstance(model, dict) else ""
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name


def _verdict(rows: Sequence[Change]) -> tuple[str, bool]:
    """A sentence about the bounds of the exported model's witnesses, and whether one is out of them."""
    bounded = [row for row in rows if row.bounds and not math.isnan(row.after.ratio)]
    breached = [row.name for row in bounded if row.breached(row.after)]
    if breached:
        return f"Out of bounds: {', '.join(breached)}.", True
    return f"All {len(bounded)} witnesses with bounds are within them." if bounded else "", False


def _recorded(samples: int, pairs: int, shown: int) -> str:
    """Where the sample videos are."""
    of = f"{samples} of {pairs} held-out pairs were recorded" if samples < pairs else f"all {samples} held-out pairs"
    return of + (f"; {shown} are in this page, the others in samples/" if shown < samples else "")


def _progress(run: _Run) -> str:
    """A sentence about a run that has not come to its end; what ended early has said so in a remark."""
    if not run.held_out.get("interim") and "after" in run.held_out and not _is_behind(run):
        return ""
    if not run.rows and not run.training:
        return ""
    of = f" of {run.steps}" if run.steps else ""
    measured = f"held-out pairs were last measured at step {run.after}" if run.after else "not measured after training"
    return f"Step {run.step}{of}; {measured}."


def _is_behind(run: _Run) -> bool:
    return run.after is not None and run.step > run.held_out["steps"].get("last", run.after)


def _headlines(run: _Run, rows: Sequence[Change], before: list[float], after: list[float]) -> list[Headline]:
    terms = [row for row in rows if row.trained]
    whole = None
    if len(terms) != 1 and before:
        conditions = run.held_out.get("conditions") or range(len(before))
        compared = paired_where_finite(before, after, conditions)
        whole = Change("objective", True, compared, reading=Reading("higher")) if compared else None
    sums = [whole] if whole else []
    return [_headline(run, row, before, after) for row in [*terms, *sums]]


def _headline(run: _Run, row: Change, before: list[float], after: list[float]) -> Headline:
    p = row.after
    sides = run.held_out["terms"].get(row.name) if row.name in run.held_out.get("terms", {}) else None
    values = [run.scores(side, sides) for side in ("before", "after")] if sides else [before, after]
    rose = sum(row.reading(b) > row.reading(a) for a, b in zip(*values, strict=True))
    which = f"{rose} of {p.count} pairs rose" if p.gain >= 0 else f"{p.count - rose} of {p.count} pairs fell"
    meaning = {
        "same": "not significant",
        "other": "significant",
        "better": "better",
        "worse": "worse",
    }[row.verdict]
    shown = _figures(p)
    return Headline(
        name=row.name,
        unit=row.reading.unit,
        better={"higher": "higher is better", "lower": "lower is better", "": ""}[row.reading.better],
        verdict=row.verdict,
        before=shown[0],
        after=shown[1],
        gain=shown[2],
        interval=shown[3],
        note=f"{meaning}, p = {_p_value(p)}; {which} (n = {p.sample})",
    )


def _p_value(p: Paired) -> str:
    return f"{p.p_value:.2f}" if p.p_value >= 0.095 else f"{p.p_value:.1g}" if p.p_value > 1e-12 else "0"


def _figures(p: Paired) -> tuple[str, str, str, str]:
    """Before, after, their difference and its 95 % interval, to the second digit of the interval's half width."""
    places = _places(p.margin, p.mean_before, p.mean_after)
    interval = f"{_fixed(p.gain - p.margin, places, '+')} to {_fixed(p.gain + p.margin, places, '+')}"
    return (
        _fixed(p.mean_before, places),
        _fixed(p.mean_after, places),
        _fixed(p.gain, places, "+"),
        interval,
    )


def _places(margin: float, *values: float) -> int:
    """Decimal places that show the second digit of a margin; of the fourth digit of the values without one."""
    if math.isfinite(margin) and margin > 1e-9 * max(map(abs, values), default=1.0):
        return min(max(1 - math.floor(math.log10(margin)), 0), 9)
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    return min(max(3 - math.floor(math.log10(largest)), 0), 9) if largest else 1


def _fixed(value: float, places: int, sign: str = "") -> str:
    """The number with a real minus sign; nothing is written as −0."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:{sign}.{places}f}"
    return text.replace("-", "" if not float(text) else "−")


def _facts(run: _Run) -> list[str]:
    """The run in a line: steps, time and cost, memory, machine, versions."""
    start = run.starts[-1] if run.starts else {}
    facts = []
    if run.training:
        facts.append(f"{run.step} steps" if run.steps in (None, run.step) else f"{run.step} of {run.steps} steps")
        seconds = sum(np.nansum(values) for key, values in run.training.items() if key.startswith("seconds/"))
        processes, _, device = str(start.get("processes", "1, device")).partition(", ")
        kind = {"cuda": "GPU", "cpu": "CPU"}.get(device, "device")
        if seconds:
            hours = seconds / 3600 * (int(processes) if processes.isdecimal() else 1)
            facts.append(f"{_duration(seconds)} of training ({hours:.2g} {kind} hours)")
        if "peak_memory_gib" in run.training:
            facts.append(f"{np.nanmax(run.training['peak_memory_gib']):.2f} GiB peak memory")
    if start:
        count = str(start.get("processes", "")).partition(",")[0]
        machine = start.get("gpu") or start.get("cpu", "")
        facts.append(f"{count} × {machine}" if count not in ("", "1") else machine)
        if "chopgrad-align" in start:
            commit = start.get("commit", "")
            facts.append(f"chopgrad-align {start['chopgrad-align']}" + (f" ({commit[:9]})" if commit else ""))
        facts += [f"{name} {start[name]}" for name in ("torch", "diffusers") if name in start]
        if "started" in start:
            facts.append(str(start["started"])[:16].replace("T", " "))
    return [fact for fact in facts if fact]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _versions(starts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Names and values; of a value that differs between starts of the run, all in order."""
    each = {name: [str(start[name]) for start in starts if name in start] for start in starts for name in start}
    return {name: " → ".join(dict.fromkeys(values)) for name, values in each.items()}


# --- samples ----------------------------------------------------------------------------------------------------------


def _shown(run: _Run, samples: list[Sample]) -> tuple[list[tuple[str, list[Pair]]], list[Pair]]:
    """The pairs of the page in groups, and the course of typical ones through training."""
    groups, room = [], _MOST_PAIRS
    for heading, group in grouped(samples):
        groups.append((heading, group[:room]))
        room -= len(groups[-1][1])
    courses = [sample for sample in typical(samples) if len(sample.course) > 2]
    count = sum(len(group) for _, group in groups) + len(courses)
    bytes_each = _VIDEO_BYTES // max(count, 8)
    prompts = read_json(run.folder / "samples" / "prompts.json", list) or []
    shown = [(heading, [_pair(run, sample, prompts, bytes_each) for sample in group]) for heading, group in groups]
    return shown, [_strip(run, sample, prompts, bytes_each) for sample in courses]


def _pair(run: _Run, sample: Sample, prompts: Sequence[str], most_bytes: int) -> Pair:
    prompt = str(prompts[sample.place]) if sample.place < len(prompts) else ""
    labels = [{"before": "Before", "after": "After"}.get(side, side.capitalize()) for side in sample.sides]
    clip = _clip(list(sample.sides.values()), labels, [], _WIDTH, most_bytes, prompt)
    scores = [
        score
        for name, sides in (run.held_out.get("terms") or {"objective": run.held_out}).items()
        if (score := _score(run, name, sides, sample.place))
    ]
    ratios = []
    for name, sides in run.held_out.get("witnesses", {}).items():
        a, b = ((run.scores(side, sides) or [math.nan])[sample.place :][:1] or [math.nan] for side in ("before", "after"))
        if a[0] > 0 and math.isfinite(b[0]):
            ratios.append((name, f"×{b[0] / a[0]:.2f}"))
        elif math.isfinite(b[0]):
            ratios.append((name, _fixed(b[0] - a[0], _places(math.nan, b[0] - a[0]), "+")))
    return Pair(sample.place, prompt, clip, scores, ratios)


def _score(run: _Run, name: str, sides: Mapping[str, Any], place: int) -> Score | None:
    reading = Reading.of(run.readings, name)
    values = [run.scores(side, sides) for side in ("before", "after")]
    if not all(place < len(each) for each in values):
        return None
    before, after = (reading(each[place]) for each in values)
    gain = after - before
    places = _places(math.nan, before, after)
    verdict = "" if not reading.better or not gain else "better" if (gain > 0) == (reading.better == "higher") else "worse"
    unit = f" {reading.unit}" if reading.unit else ""
    return Score(name, _fixed(before, places), _fixed(after, places) + unit, _fixed(gain, places, "+"), verdict)


def _strip(run: _Run, sample: Sample, prompts: Sequence[str], most_bytes: int) -> Pair:
    steps = spread(list(sample.course), _MOST_STEPS, run.after)
    prompt = str(prompts[sample.place]) if sample.place < len(prompts) else ""
    by_step = {measurement.step: measurement for measurement in run.measured}
    only = next(iter(by_step[0].terms)) if 0 in by_step and len(by_step[0].terms) == 1 else None
    notes = []
    for step in steps:
        values = (by_step[step].terms[only] if only else by_step[step].objective) if step in by_step else []
        value = values[sample.place] if sample.place < len(values) else math.nan
        read = Reading.of(run.readings, only)(value) if only else value
        notes.append(_fixed(read, _places(math.nan, read)))
    labels = ["Base" if step == 0 else f"Step {step}" for step in steps]
    chosen = steps.index(run.after) if run.after in steps and len(steps) > 2 else None
    paths = [sample.course[step] for step in steps]
    clip = _clip(paths, labels, notes, _WIDTH_OF_STEP, most_bytes, prompt, chosen)
    return Pair(sample.place, prompt, clip, [], [])


def _clip(
    paths: Sequence[Path],
    labels: list[str],
    notes: list[str],
    widest: int,
    most_bytes: int,
    prompt: str,
    chosen: int | None = None,
) -> Clip:
    fused = fuse(paths, widest, most_bytes)
    uris = data_uri(fused.mp4, "video/mp4"), data_uri(fused.poster, "image/jpeg")
    alt = ", ".join(labels) + (f": {prompt}" if prompt else "")
    return Clip(*uris, fused.size, labels, notes, alt, fused.enlarged, chosen)


# --- tables and curves ------------------------------------------------------------------------------------------------


def _witnessed(run: _Run, row: Change) -> Witnessed:
    p = row.after
    before, after, gain, interval = _figures(p)
    spark = Markup("")
    means = [m.row() for m in run.measured]
    key = f"heldout/{row.name}" if row.trained else f"heldout/witness/{row.name}"
    first = means[0].get(key, math.nan) if means else math.nan
    if len(means) > 2 and first > 0 and not row.reading.unit:
        ratios = [mean.get(key, math.nan) / first for mean in means]
        spark = sparkline_svg([m.step for m in run.measured], ratios, row.bounds)
    return Witnessed(row, before, after, gain, interval, spark)


def _legend(panel: Panel) -> list[tuple[str, str]]:
    """Classes of swatches, and what they stand for."""
    several = len(panel.lines) > 1
    found = [(f"s{i}", line.label) for i, line in enumerate(panel.lines) if line.label and (several or panel.points)]
    return found + ([("dot", "held out")] if panel.points else [])


def _pairs_table(run: _Run, rows: Sequence[Change]) -> dict[str, Any]:
    """The scores of all pairs, by term."""
    before = run.held_out.get("before")
    if not before or "after" not in run.held_out:
        return {}
    terms = run.held_out.get("terms") or {"objective": run.held_out}
    prompts = run.held_out.get("prompts") or [""] * len(before)
    seeds = run.held_out.get("seeds") or [""] * len(before)
    columns = [[_score(run, name, sides, place) for place in range(len(before))] for name, sides in terms.items()]
    return {"terms": list(terms), "rows": list(zip(prompts, map(str, seeds), zip(*columns, strict=True), strict=True))}

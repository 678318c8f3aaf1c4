"""A run as one page: `report.html`, self-contained, so that it can be opened from the disk, mailed and archived."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from ..common.errors import UsageError
from .changes import Change, changes, ratio
from .curves import read_metrics
from .heldout import Paired, paired_where_finite
from .page import data_uri, write_page

_TINY = 256  # pixels; narrower videos are shown pixel by pixel, not blurred


@dataclass(frozen=True)
class _Clip:
    uri: str
    tiny: bool


@dataclass(frozen=True)
class _Sample:
    prompt: str
    sides: list[tuple[str, _Clip | None]]


@dataclass(frozen=True)
class _HeldOut:
    statistics: Paired | None  # None if too few scores are finite
    improved: int
    rows: list[tuple[str, str, float, float]]  # prompt, seed, before, after
    changes: list[Change]


def write_report(run: str | Path) -> Path:
    """Write `report.html` into a run folder, from what the folder holds; every part may be missing.

    Read are `heldout.json` (`before`, `after`, and optionally `conditions` as `paired` takes them, `prompts`, `seeds`,
    what `changes` reads, and `remarks`), `curves.png`, `metrics.jsonl`, `samples/{before,after}/NNN.mp4` (and
    `control`, `degraded`, `target`) with `samples/prompts.json`, `config.yaml` and `environment.json` (an object, or a
    list with one for each start of the run).
    Videos and pictures are embedded, so the page is a third larger than they are.

    Raises:
        UsageError: no such folder, a file in it that is not what its name says, or the page cannot be written.
    """
    run = Path(run)
    if not run.is_dir():
        raise UsageError(f"there is no run folder {run}; give the folder that a training run wrote")
    path = run / "report.html"
    write_page(
        path,
        "report.html",
        held_out=_held_out(run),
        ratio=ratio,
        summary=_summary(run),
        remarks=(_read_json(run / "heldout.json", dict) or {}).get("remarks", []),
        curves=data_uri(curves.read_bytes(), "image/png") if (curves := run / "curves.png").is_file() else "",
        samples=_samples(run / "samples"),
        config=(run / "config.yaml").read_text(encoding="utf-8") if (run / "config.yaml").is_file() else "",
        versions=_environment(run / "environment.json"),
    )
    return path


def _environment(path: Path) -> dict[str, str]:
    """Names and values; of a value that differs between starts of the run, all in order."""
    found = _read_json(path, dict | list) or []
    starts = [start for start in (found if isinstance(found, list) else [found]) if isinstance(start, dict)]
    each = {name: [str(start[name]) for start in starts if name in start] for start in starts for name in start}
    return {name: " → ".join(dict.fromkeys(values)) for name, values in each.items()}


def _read_json(path: Path, kind: Any) -> Any:
    """The file's content, None if there is none."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}); correct or delete it") from error
    if not isinstance(content, kind):
        expected = kind.__name__ if isinstance(kind, type) else kind
        raise UsageError(f"expected a JSON {expected} in {path}, got {content!r:.40}; correct or delete it")
    return content


def _held_out(run: Path) -> _HeldOut | None:
    scores = _read_json(run / "heldout.json", dict)
    if scores is None or "after" not in scores:
        return None
    before, after = ([math.nan if v is None else v for v in scores.get(side, [])] for side in ("before", "after"))
    prompts = scores.get("prompts") or [""] * len(before)
    seeds = scores.get("seeds") or [""] * len(before)
    statistics = paired_where_finite(before, after, scores.get("conditions") or range(len(before)))
    improved = sum(b > a for a, b in zip(before, after, strict=True))
    rows = list(zip(prompts, map(str, seeds), before, after, strict=True))
    return _HeldOut(statistics, improved, rows, changes(scores))


def _summary(run: Path) -> list[tuple[str, str]]:
    """Names and values of what the training rows say in a word."""
    if not (run / "metrics.jsonl").is_file():
        return []
    training, _ = read_metrics(run)
    if not training:
        return []
    facts = [("steps", f"{training['step'][-1]:.0f}")]
    seconds = sum(values[values == values].sum() for key, values in training.items() if key.startswith("seconds/"))
    if seconds:
        facts.append(("training time", f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"))
    if "peak_memory_gib" in training:
        facts.append(("peak memory", f"{max(training['peak_memory_gib']):.2f} GiB"))
    return facts


def _samples(folder: Path) -> list[_Sample]:
    prompts = _read_json(folder / "prompts.json", list) or []
    # Of runs with clips also what a prediction starts from, and what it should be.
    shown = ("control", "degraded", "before", "after", "target")
    sides = [side for side in shown if side in ("before", "after") or (folder / side).is_dir()]
    names = sorted({path.name for side in ("before", "after") for path in (folder / side).glob("*.mp4")})
    return [
        _Sample(
            prompts[int(name[:-4])] if name[:-4].isdecimal() and int(name[:-4]) < len(prompts) else "",
            [(side, _clip(folder / side / name)) for side in sides],
        )
        for name in names
    ]


def _clip(path: Path) -> _Clip | None:
    if not path.is_file():
        return None
    try:
        with av.open(str(path)) as container:
            width = container.streams.video[0].width
    except (OSError, IndexError, av.error.FFmpegError) as error:
        raise UsageError(f"{path} is not a video; delete it and write the report again") from error
    return _Clip(data_uri(path.read_bytes(), "video/mp4"), width < _TINY)

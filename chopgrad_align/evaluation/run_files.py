"""Files of a run folder, read for people: each may be missing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..common.errors import UsageError
from .course import read_metrics
from .measurement import Measurement, comparison, read_measurements


def read_json(path: Path, kind: Any) -> Any:
    """The file's content, None if there is none.

    Raises:
        UsageError: It is not JSON, or not of that kind.
    """
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


class RunFiles:
    """The files of a run that its page is made of; each may be missing.

    Attributes:
        folder: Where they are.
        measured: The held-out measurements.
        held_out: `heldout.json`; of a run that was killed before there was one, made of the measurements.
        readings: The way people read each term.
        training, rows: Training and held-out rows of `metrics.jsonl`.
        config: `config.yaml`, as text.
        settings: The same, parsed.
        starts: `environment.json`: facts of each start of the run.

    Args:
        folder: Of a run.

    Raises:
        UsageError: A file that is not what its name says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.measured: list[Measurement] = read_measurements(folder / "heldout")
        held_out = read_json(folder / "heldout.json", dict)
        if "after" not in (held_out or {}) and len(self.measured) > 1:  # of a run that was killed
            held_out = {**comparison(self.measured, self.measured[-1]), "interim": True}
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

    @property
    def terms(self) -> Mapping[str, Any]:
        """The scores of each term before and after; of a run that has none, of the objective."""
        return self.held_out.get("terms") or ({"objective": self.held_out} if "after" in self.held_out else {})

    def scores(self, side: str, of: Mapping[str, Any] | None = None) -> list[float]:
        """The objective of each pair, or a term or witness, `before` or `after`; NaN where it is not finite."""
        return [math.nan if v is None else v for v in (self.held_out if of is None else of).get(side, [])]

    def pair(self, place: int, of: Mapping[str, Any]) -> tuple[float, float]:
        """A term or witness of the pair at a place, before and after; NaN if it was not measured."""
        before, after = ([*self.scores(side, of)[place : place + 1], math.nan][0] for side in ("before", "after"))
        return before, after

"""The sample videos of a run's page: each pair fused into one video, under it its scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..objective.reading import Reading
from .figures import fixed, places
from .fused_video import fuse
from .page import data_uri
from .run_files import RunFiles, read_json
from .samples import Sample, grouped, spread, typical

_MOST_PAIRS = 32  # in the page; the others stay in the folder
_MOST_STEPS = 8  # of a pair, through training
_VIDEO_BYTES = 15_000_000  # of all videos in the page; as text they are a third larger
_WIDTH, _WIDTH_OF_STEP = 416, 208  # pixels of one video in the page, at most


@dataclass(frozen=True)
class Score:
    """A term of one pair, before and after, as texts."""

    name: str
    before: str
    after: str
    gain: str
    verdict: str


@dataclass(frozen=True)
class Clip:
    """A video of the page, with a label and perhaps a note for each of the videos that are fused in it."""

    uri: str
    poster: str
    size: tuple[int, int]
    gap: float  # between two videos, in percent of the width
    tiny: bool
    labels: Sequence[str]
    notes: Sequence[str]
    chosen: int | None  # the column of the exported step

    @property
    def columns(self) -> int:
        """How many videos it shows."""
        return len(self.labels)


@dataclass(frozen=True)
class Pair:
    """A held-out pair of the page."""

    prompt: str
    clip: Clip
    scores: Sequence[Score] = ()
    witnesses: Sequence[tuple[str, str]] = ()


def shown_samples(run: RunFiles, samples: Sequence[Sample]) -> tuple[list[tuple[str, list[Pair]]], list[Pair]]:
    """The pairs of the page in groups with their headings, and typical ones through training.

    Raises:
        UsageError: A file that is not a video.
    """
    groups, room = [], _MOST_PAIRS
    for heading, group in grouped(samples):
        groups.append((heading, group[:room]))
        room -= len(groups[-1][1])
    courses = [sample for sample in typical(samples) if len(sample.course) > 2]
    most_bytes = _VIDEO_BYTES // max(sum(len(group) for _, group in groups) + len(courses), 8)
    prompts = read_json(run.folder / "samples" / "prompts.json", list) or []
    pages = _Pairs(run, [str(prompt) for prompt in prompts], most_bytes)
    return [(heading, [*map(pages.pair, group)]) for heading, group in groups], [*map(pages.course, courses)]


def score(run: RunFiles, name: str, sides: Mapping[str, Any], place: int) -> Score:
    """A term of the pair at a place, as people read it."""
    reading = Reading.of(run.readings, name)
    before, after = map(reading, run.pair(place, sides))
    gain, digits = after - before, places(before, after)
    verdict = ""
    if reading.better and gain and math.isfinite(gain):
        verdict = "better" if (gain > 0) == (reading.better == "higher") else "worse"
    unit = f" {reading.unit}" if reading.unit else ""
    return Score(name, fixed(before, digits), fixed(after, digits) + unit, fixed(gain, digits, "+"), verdict)


@dataclass(frozen=True)
class _Pairs:
    """The pairs of a run, made for its page."""

    run: RunFiles
    prompts: Sequence[str]
    most_bytes: int  # of a video

    def pair(self, sample: Sample) -> Pair:
        """Everything before and after, with scores and witnesses."""
        run, place = self.run, sample.place
        clip = self._clip(list(sample.sides.values()), [side.capitalize() for side in sample.sides], _WIDTH)
        scores = [score(run, name, sides, place) for name, sides in run.terms.items()]
        watched = run.held_out.get("witnesses", {}).items()
        witnesses = [(name, text) for name, sides in watched if (text := _relative(*run.pair(place, sides)))]
        return Pair(self._prompt(sample), clip, scores, witnesses)

    def course(self, sample: Sample) -> Pair:
        """The base model and the measured steps, each with its score."""
        run = self.run
        steps = spread(list(sample.course), _MOST_STEPS, run.after)
        paths = [sample.course[step] for step in steps]
        labels = ["Base" if step == 0 else f"Step {step}" for step in steps]
        chosen = steps.index(run.after) if run.after in steps else None
        notes = [self._score_at(step, sample.place) for step in steps]
        return Pair(self._prompt(sample), self._clip(paths, labels, _WIDTH_OF_STEP, notes, chosen))

    def _prompt(self, sample: Sample) -> str:
        return self.prompts[sample.place] if sample.place < len(self.prompts) else ""

    def _score_at(self, step: int, place: int) -> str:
        """The one term of the objective at a step, or the objective."""
        measured = next((m for m in self.run.measured if m.step == step), None)
        if measured is None or place >= len(measured.objective):
            return ""
        if len(measured.terms) == 1:
            ((name, values),) = measured.terms.items()
            value = Reading.of(self.run.readings, name)(values[place])
        else:
            value = measured.objective[place]
        return fixed(value, places(value))

    def _clip(
        self,
        paths: Sequence[Path],
        labels: Sequence[str],
        widest: int,
        notes: Sequence[str] = (),
        chosen: int | None = None,
    ) -> Clip:
        fused = fuse(paths, widest, self.most_bytes)
        uri, poster = data_uri(fused.mp4, "video/mp4"), data_uri(fused.poster, "image/jpeg")
        return Clip(uri, poster, fused.size, 100 * fused.gap / fused.size[0], fused.enlarged, labels, notes, chosen)


def _relative(before: float, after: float) -> str:
    """A witness relative to before, or its difference where that is not positive; empty if one is not finite."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return ""
    return f"×{after / before:.2f}" if before > 0 else f"{after - before:+.2g}".replace("-", "−")

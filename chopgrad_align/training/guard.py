"""The guard of a run: what becomes of it when a held-out measurement looks like reward hacking."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from types import MappingProxyType
from typing import Literal

from ..evaluation.heldout import paired_where_finite
from ..evaluation.measurement import Measurement
from ..evaluation.witnesses import Bounds


@dataclass(frozen=True)
class Verdict:
    """The judgement of a measurement.

    Attributes:
        within: Whether the model of that step may be exported as the best.
        stop: Whether training ends here.
        back: Whether the best model is exported then, whatever `checkpoint.export` says.
        sentences: What was found, for people; each by what it is about, such as the name of a witness.
    """

    within: bool = True
    stop: bool = False
    back: bool = False
    sentences: Mapping[str, str] = field(default_factory=dict)


class Guard(ABC):
    """A judge of measurements. It holds no state: a resumed run, which knows the same past, is judged the same.

    Attributes:
        bounds: Of witnesses, for those who want to show them.
    """

    bounds: Mapping[str, Bounds] = MappingProxyType({})

    @abstractmethod
    def judge(self, baseline: Measurement, past: Sequence[Measurement], now: Measurement) -> Verdict:
        """Judge a measurement.

        Args:
            baseline: Of the model before training.
            past: After it and before this one, in order.
            now: This one.
        """


@dataclass(frozen=True)
class BoundsAndPatience(Guard):
    """Bounds on witnesses, and patience with the held-out objective.

    Args:
        bounds: For each witness the range of its mean relative to the base model's. One whose mean is not positive in
            the base model has no such ratio and is not judged.
        patience: How many measurements in a row may not rise above the best before them, the base model's included,
            until training is said to rise no more; None: any number.
        on_breach: `warn`: say it and go on. `stop`: end the training there. `back`: the same, and export the best model
            within the bounds.
    """

    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    patience: int | None = None
    on_breach: Literal["warn", "stop", "back"] = "warn"

    def judge(self, baseline: Measurement, past: Sequence[Measurement], now: Measurement) -> Verdict:
        """See `Guard`."""
        sentences = {name: text for name in self.bounds if (text := self._out_of_bounds(name, baseline, now))}
        within = not sentences
        if text := self._impatient([baseline, *past, now]):
            sentences["patience"] = text
        ends = bool(sentences) and self.on_breach != "warn"
        return Verdict(within, ends, ends and self.on_breach == "back", sentences)

    def _out_of_bounds(self, name: str, baseline: Measurement, now: Measurement) -> str:
        """The sentence if a witness is out of its bounds."""
        before, bounds = baseline.witnesses.get(name), self.bounds[name]
        if before is None:  # there was nothing to measure
            return ""
        after = now.witnesses.get(name, [math.nan] * len(before))
        if any(math.isfinite(b) and not math.isfinite(a) for b, a in zip(before, after, strict=True)):
            return f"{name} of some video is not finite at step {now.step}"
        change = paired_where_finite(before, after, now.conditions)
        if change is None or math.isnan(change.ratio) or change.ratio in bounds:
            return ""
        verb, bound = ("fell", bounds.least) if change.ratio < bounds.least else ("rose", bounds.most)
        return f"{name} {verb} to {change.ratio:.3g} of the base model's (bound {bound:g}) at step {now.step}"

    def _impatient(self, measured: Sequence[Measurement]) -> str:
        """The sentence if the objective has not risen for too long."""
        if self.patience is None:
            return ""
        scores = [score(measured[0], each) for each in measured]
        best = scores.index(max(scores))
        waited = len(measured) - 1 - best
        if waited < self.patience:
            return ""
        return (
            f"the held-out objective at step {measured[-1].step} is no better than at step {measured[best].step}, "
            f"{waited} measurements before (patience {self.patience})"
        )


def remarks(verdicts: Sequence[Verdict]) -> list[str]:
    """The sentences that tell a run: of each thing the first one, and the last measurement's."""
    first = {about: text for verdict in reversed(verdicts) for about, text in verdict.sentences.items()}
    last = verdicts[-1].sentences if verdicts else {}
    return [text for about in first for text in dict.fromkeys((first[about], last.get(about, first[about])))]


def score(baseline: Measurement, now: Measurement) -> float:
    """Mean of the objective over the pairs whose first one, the base model's, is finite; -∞ if one no longer is."""
    values = [value for first, value in zip(baseline.objective, now.objective, strict=True) if math.isfinite(first)]
    return fmean(values) if values and all(map(math.isfinite, values)) else -math.inf


def best(measured: Sequence[Measurement], verdicts: Sequence[Verdict]) -> Measurement | None:
    """The measurement with the best objective of those within the bounds, the first of equals; None if there is none.

    Args:
        measured: The base model's, which is not a candidate, and those after it.
        verdicts: On each of those.
    """
    passed = [m for m, verdict in zip(measured[1:], verdicts, strict=True) if verdict.within]
    finite = [m for m in passed if math.isfinite(score(measured[0], m))]
    return max(finite, key=lambda m: score(measured[0], m), default=None)


def exported(
    measured: Sequence[Measurement], verdicts: Sequence[Verdict], export: Literal["best", "last"]
) -> tuple[Measurement, str]:
    """The measurement of the model to export, and a sentence about it; empty if it is the last, as expected.

    Args:
        measured: As for `best`; at least one after the base model's.
        verdicts: As for `best`.
        export: What the config wants.
    """
    last = measured[-1]
    if export == "last" and not verdicts[-1].back:
        return last, ""
    found = best(measured, verdicts)
    if found is None:
        return last, f"no measured step is within the bounds and finite: lora/ holds the last, step {last.step}"
    if found is last:
        return last, ""
    return found, (
        f"lora/ holds step {found.step}, the best within the bounds of {len(measured) - 1} measured steps, and not the "
        f"last, {last.step}; since the held-out pairs chose it, its gain on them is a little flattered"
    )

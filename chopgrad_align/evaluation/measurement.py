"""Held-out measurements: scores of the same pairs of condition and seed at one step, and two of them side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..common.errors import UsageError


@dataclass(frozen=True)
class Measurement:
    """Findings of one held-out measurement: lists have an entry for each pair, in an order that is always the same.

    Attributes:
        step: Optimizer steps before it; 0 for the base model.
        objective: What should rise.
        terms: Scores of each term of the objective.
        witnesses: Values of each witness; one that has no value for any pair is left out.
        prompts: Of each pair.
        conditions: Equal for pairs of one condition.
    """

    step: int
    objective: list[float]
    terms: dict[str, list[float]]
    witnesses: dict[str, list[float]]
    prompts: list[str]
    conditions: list[int]

    def row(self) -> dict[str, float]:
        """A row of metrics: mean of the objective, its standard error, and means of terms and witnesses.

        Values that are not finite are left out.
        """
        total = torch.tensor([value for value in self.objective if math.isfinite(value)], dtype=torch.float64)
        return {
            "step": self.step,
            "heldout/reward_mean": total.mean().item(),
            "heldout/reward_stderr": total.std().item() / len(total) ** 0.5 if len(total) > 1 else math.nan,
            **{f"heldout/{name}": _mean_of_numbers(values) for name, values in self.terms.items()},
            **{f"heldout/witness/{name}": _mean_of_numbers(values) for name, values in self.witnesses.items()},
        }

    def to_json(self) -> str:
        """JSON, with null for what is not finite."""
        return json.dumps(with_nulls(asdict(self)))

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        """The measurement that `to_json` wrote."""
        saved = json.loads(text)
        lists = {name: {k: _with_nan(v) for k, v in saved[name].items()} for name in ("terms", "witnesses")}
        return cls(**{**saved, **lists, "objective": _with_nan(saved["objective"])})


def comparison(measured: Sequence[Measurement], after: Measurement) -> dict[str, Any]:
    """Base model and exported model side by side, for JSON: for each pair the objective, terms and witnesses.

    Args:
        measured: The base model's, and those after it.
        after: The one of the model that is exported.
    """
    before, last = measured[0], measured[-1]
    sides = {"before": before, "after": after} | ({} if last is after else {"last": last})

    def each(of: Callable[[Measurement], dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
        return {n: {s: of(m)[n] for s, m in sides.items() if n in of(m)} for n in of(before) if n in of(after)}

    return with_nulls(
        {
            **{side: measurement.objective for side, measurement in sides.items()},
            "steps": {side: measurement.step for side, measurement in sides.items()},
            "prompts": after.prompts,
            "conditions": after.conditions,
            "terms": each(lambda m: m.terms),
            "witnesses": each(lambda m: m.witnesses),
        }
    )


def with_nulls(tree: Any) -> Any:
    """A tree of lists and dicts in which numbers that JSON lacks are None."""
    if isinstance(tree, dict):
        return {key: with_nulls(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [with_nulls(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _with_nan(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _mean_of_numbers(values: Sequence[float]) -> float:
    return fmean(numbers) if (numbers := [v for v in values if math.isfinite(v)]) else math.nan


def read_measurements(folder: Path) -> list[Measurement]:
    """The measurements in `step-NNNNNN.json` of a folder, in the order of their steps; empty if there are none.

    Raises:
        UsageError: A file that is none.
    """
    found = []
    for path in folder.glob("step-*.json"):
        try:
            found.append(Measurement.from_json(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not a measurement of a run; correct or delete it") from error
    return sorted(found, key=lambda measurement: measurement.step)

"""Held-out measurements of a run: taken, judged by its guard, and the best weights kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from ..evaluation.measurement import Measurement, comparison, with_nulls
from ..evaluation.witnesses import Witness
from .batches import Batches, held_out_seed
from .checkpoints import write_weights
from .config import Validation as Settings
from .data import Data
from .folder import RunFolder
from .guard import Guard, Verdict, best, remarks
from .history import History
from .measurement import evaluate, joined
from .methods import Method
from .parallel import Replicas
from .state import TrainState
from .stopping import StopRequests


@dataclass
class Validation:
    """The measurements of a run.

    Attributes:
        method: Makes the videos and scores them.
        data, batches: The held-out pairs.
        settings: How many there are, and how they are shown.
        fps: Of the sample videos.
        witnesses: Observe the videos beside the objective.
        guard: Judges each measurement but the first.
        history: The measurements so far; the first is of the model before training.
        verdicts: The guard's, on each of the others.
    """

    method: Method
    data: Data
    batches: Batches
    settings: Settings
    fps: float
    witnesses: Mapping[str, Witness]
    guard: Guard
    parallel: Replicas
    folder: RunFolder
    requests: StopRequests
    history: History
    verdicts: list[Verdict] = field(default_factory=list)

    def measure(self, state: TrainState, name: str) -> Measurement:
        """Measure the held-out pairs, and keep the weights if they are the best; samples go into a folder.

        Raises:
            Interrupted: A process was asked to stop; nothing was measured then.
        """
        state.trainable.eval()
        settings, objective = self.settings, self.method.objective.measured
        with state.averaged():
            weights = state.trainable.state_dict()
            share = evaluate(
                self.method.pipe,
                dict(self.method.call),
                self.method.prediction,
                objective,
                self.witnesses,
                self.batches,
                settings.pairs,
                settings.batch,
                (self.parallel.group, self.parallel.groups),
                (self.folder.samples / name, settings.videos, self.fps) if self.parallel.first else None,
                lambda: self.parallel.greatest(self.requests.number()),
                shown=self.parallel.is_main,
            )
        self.requests.stop_if_any(self.parallel)
        scores, progress = joined(self.parallel.gather_objects(share)), state.progress
        progress.initial = progress.initial or objective.first_statistics(scores.terms)
        raw = {name: torch.tensor(values, dtype=torch.float64) for name, values in scores.terms.items()}
        values = objective.values(raw, scores.weights, progress.initial)
        groups = self.data.groups(settings.pairs, settings.seeds)
        now = Measurement(
            step=progress.step,
            objective=torch.stack([*values.values()]).sum(0).tolist(),
            terms=scores.terms,
            witnesses=self.history.values(self.witnesses, scores.kept, groups),
            prompts=scores.prompts,
            conditions=self.data.conditions(settings.pairs, settings.seeds),
        )
        self._take_up(now, weights)
        return now

    def _take_up(self, now: Measurement, weights: dict[str, torch.Tensor]) -> None:
        measured = [*self.history.measured, now]
        if len(measured) > 1:
            self.verdicts.append(self.guard.judge(measured[0], measured[1:-1], now))
        if self.parallel.is_main:
            if best(measured, self.verdicts) is now:
                with self.folder.best_weights(now.step) as path:  # first, so that what is said to be the best is there
                    write_weights(weights, path)
            for sentence in self.verdicts[-1].sentences.values() if self.verdicts else ():
                tqdm.write(f"guard: {sentence}")
            self.folder.write(self.folder.samples / "prompts.json", json.dumps(now.prompts))
        self.history.add(now, write=self.parallel.is_main)
        if self.parallel.is_main and len(measured) > 1:  # so that a run that is killed has a report too
            self.folder.write(self.folder.held_out, json.dumps({**self.compared(now), "interim": True}))

    def compared(self, after: Measurement | None, sentences: Sequence[str] = ()) -> dict[str, Any]:
        """The content of `heldout.json`: the base model beside a later measurement, if there is one.

        Args:
            after: The later one.
            sentences: Follow the guard's remarks.
        """
        found: dict[str, Any] = {"remarks": [*remarks(self.verdicts), *sentences]}
        if after is not None:
            found |= comparison(self.measured, after)
            found["seeds"] = [held_out_seed(i) for i in range(len(after.prompts))]
            found["bounds"] = {name: [b.least, b.most] for name, b in self.guard.bounds.items()}
            found["readings"] = {n: term.reading.to_dict() for n, term in self.method.objective.terms.items()}
        return with_nulls(found)

    @property
    def measured(self) -> list[Measurement]:
        """All measurements, in order."""
        return self.history.measured

    @property
    def ends_training(self) -> bool:
        """True if the guard ended the training by its last verdict."""
        return bool(self.verdicts) and self.verdicts[-1].stop

    def restore(self, step: int) -> None:
        """Take up the measurements until a step, and judge them again."""
        self.history.load(step)
        measured = self.measured
        self.verdicts = [
            self.guard.judge(measured[0], measured[1:place], measured[place]) for place in range(1, len(measured))
        ]

    def forget_worse(self) -> None:
        """Remove kept weights that are the best no more."""
        found = best(self.measured, self.verdicts)
        self.folder.forget_best(but=found.step if found else None)

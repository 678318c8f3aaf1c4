"""All state of a run in one place: what a checkpoint holds, and what a resumed run starts from."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from ..objective.statistics import Statistics
from .average import Average
from .optimizers import at_average, has_average
from .trainable import Trainable


@dataclass
class Progress:
    """Counters and statistics of a run; plain numbers.

    Attributes:
        step: Optimizer steps that are done.
        skipped: Those of them that changed no weight, because a loss or gradient was not finite.
        skipped_in_a_row: The last ones of these.
        initial: Statistics of normalized terms of the model as it was: with these held-out scores stay comparable.
        running: The same, followed over training.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    initial: dict[str, Statistics] = field(default_factory=dict)
    running: dict[str, Statistics] = field(default_factory=dict)

    def count(self, finite: bool, scores: Mapping[str, Sequence[float]]) -> None:
        """Count a step, and follow the scores of its videos by term if it was finite."""
        self.step += 1
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if finite:
            self.running = {name: statistics.updated(scores[name]) for name, statistics in self.running.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Any]) -> Progress:
        """The progress that `state_dict` was taken of."""
        statistics = {
            key: {name: Statistics(**values) for name, values in saved[key].items()} for key in ("initial", "running")
        }
        return cls(**{**saved, **statistics})


@dataclass
class TrainState:
    """The state that changes while a run trains.

    Attributes:
        trainable: Holds the trained weights.
        optimizer: Updates them.
        schedule: Sets its learning rate; one step of it a step of the run.
        average: Of the weights, if there is one.
        progress: Everything else.
    """

    trainable: Trainable
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    average: Average | None = None
    progress: Progress = field(default_factory=Progress)

    def update(self) -> None:
        """Change the weights by their gradients."""
        self.optimizer.step()
        if self.average is not None:
            self.average.update()

    def next_learning_rate(self) -> None:
        """Let the schedule take a step, whether weights were changed in this one or not."""
        with warnings.catch_warnings():  # torch warns if the first step changed nothing
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.schedule.step()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context the weights are those that are measured and exported: their average, if there is one."""
        if self.average is None and not has_average(self.optimizer):
            yield
            return
        # Kept and put back: a schedule-free optimizer interpolates there and back, which is not exact.
        parameters = self.trainable.parameters
        trained = [parameter.detach().clone() for parameter in parameters]
        try:
            with at_average(self.optimizer):
                if self.average is not None:
                    self.average.apply()
                yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, trained, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The trained weights as tensors by name, the states of optimizer, schedule and average, and the progress."""
        return {
            "weights": self.trainable.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": None if self.average is None else self.average.weights,
            "progress": self.progress.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.trainable.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.load(state["average"])
        self.progress = Progress.from_state_dict(state["progress"])

    def change_learning_rate(self, learning_rate: float) -> None:
        """Let the schedule go on from another full learning rate."""
        ratio = learning_rate / self.schedule.base_lrs[0]
        self.schedule.base_lrs = [ratio * each for each in self.schedule.base_lrs]
        for group in self.optimizer.param_groups:
            group["lr"], group["initial_lr"] = ratio * group["lr"], ratio * group["initial_lr"]

"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..common.errors import Interrupted, UsageError
from ..data.order import mix
from ..evaluation.heldout import Paired
from ..evaluation.measurement import Measurement
from .batches import Batches, on_device
from .checkpoints import write_state
from .config import Config
from .folder import RunFolder
from .methods import Method, MicroBatch
from .observers import Observers
from .outcome import Outcome
from .parallel import LostContactError, Replicas
from .phases import Phases
from .prefetch import Prefetched
from .profiling import profiled
from .state import TrainState
from .stopping import StopRequests, signal_name
from .validation import Validation

_MOST_SKIPS = 3  # non-finite steps in a row
_SECONDS_TO_BE_ENDED = 5.0


class LostError(UsageError):
    """Steps no longer change anything."""


@dataclass
class Trainer:
    """The training of a run, on one process.

    All randomness is a function of the seed, the step and the sample, so that a resumed run is the same run, and that
    the number of processes and the size of micro-batches change rounding only. The exception is what layers draw as
    they run, the masks of `lora.dropout` > 0 and noise that a decoder injects: that is seeded by the step and all
    samples of the micro-batch, so that results then depend on how the batch is split.
    """

    config: Config
    parallel: Replicas
    shares: list[range]
    batches: Batches
    method: Method
    state: TrainState
    validation: Validation
    outcome: Outcome
    folder: RunFolder
    phases: Phases
    requests: StopRequests
    observers: Observers
    profile: int = 0  # steps to trace
    inputs: dict[str, str] = field(default_factory=dict)  # fingerprints of what is read
    saved: int | None = None  # the step of the last checkpoint

    def run(self) -> Paired | None:
        """Measure, train, save and report; the main process returns the comparison of before and after."""
        with self.requests:
            try:
                self.train()
                result = self.finish()
            except (Interrupted, LostError) as early:
                self.finish_early(early)
                raise
            except LostContactError:
                # A launcher ends the other processes of one that failed; the error to read is that one's.
                if number := self.requests.wait(_SECONDS_TO_BE_ENDED):
                    raise Interrupted(number) from None
                raise
        self.parallel.end()
        return result

    def train(self) -> None:
        """Measure the model as it is, and take the steps that are left."""
        progress, steps = self.state.progress, self.config.train.steps
        if not self.validation.measured:
            self.measure_baseline()
        elif not self.validation.history.has(progress.step):  # killed between the checkpoint and its measurement
            self.measure_if_due()
        places = ((step, share) for step in range(progress.step, steps) for share in self.shares)
        with (
            Prefetched(self.batches.micro_batch, places) as micro_batches,
            self.observers.bar(progress.step),
            profiled(self.profile if self.parallel.is_main else 0, self.folder.trace) as count_step,
        ):
            while progress.step < steps and not self.validation.ends_training:
                row = self.step(micro_batches)
                self.observers.row(row)
                self.tell_if_idle(row)
                count_step()
                self.stop_if_lost(row)
                if progress.step == steps or self.is_due(self.config.checkpoint.every):
                    self.save()
                self.requests.stop_if_any(self.parallel)
                self.measure_if_due()

    def step(self, micro_batches: Iterator[MicroBatch]) -> dict[str, float]:
        """Take one optimizer step, of this process's part of the batch; returns the row of metrics."""
        state, progress = self.state, self.state.progress
        state.trainable.train()
        torch.manual_seed(mix(self.config.run.seed, progress.step))  # for what draws outside of the method
        results = []
        for _ in self.shares:
            with self.phases("data"):
                micro_batch = on_device(next(micro_batches), self.parallel.device)
            results.append(self.method.accumulate(micro_batch, progress.running))
        with self.phases("step"):
            table = self.parallel.gather(torch.cat(results))  # a row for each video of the batch
            parameters = state.trainable.parameters
            self.parallel.sum_gradients(parameters)
            norm = float(nn.utils.clip_grad_norm_(parameters, self.config.train.max_grad_norm))
            finite = math.isfinite(norm) and bool(torch.isfinite(table).all())
            learning_rate = state.optimizer.param_groups[0]["lr"]
            if finite:
                state.update()
            state.optimizer.zero_grad(set_to_none=True)
            state.next_learning_rate()
        progress.count(finite, dict(zip(self.method.objective.terms, table[:, 1:].T.tolist(), strict=False)))
        return self.row(table, norm, learning_rate)

    def row(self, table: Tensor, norm: float, learning_rate: float) -> dict[str, float]:
        """Metrics of the step that was just taken."""
        reward, *means = table.mean(0).tolist()
        keys = [f"{name}/{kind}" for kind in ("score", "value") for name in self.method.objective.terms]
        return {
            "step": self.state.progress.step,
            "reward": reward,
            "loss": -reward,
            "grad_norm": norm,
            **dict(zip(keys, means, strict=True)),
            **{f"{name}/std": statistics.std for name, statistics in self.state.progress.running.items()},
            "learning_rate": learning_rate,
            "skipped": self.state.progress.skipped,
            **self.phases.collect(),
        }

    def stop_if_lost(self, row: dict[str, float]) -> None:
        """Raise a LostError if several steps in a row changed nothing."""
        skips = self.state.progress.skipped_in_a_row
        if skips >= _MOST_SKIPS:
            raise LostError(
                f"{skips} steps in a row, up to step {row['step']:.0f}, had a loss or gradient that is not finite "
                f"(reward {row['reward']:.4g}, gradient norm {row['grad_norm']:.4g}): go on by --resume with a "
                "lower train.learning_rate or train.max_grad_norm, or start again with model.dtype=float32 or fewer "
                "gradient.last_steps"
            )

    def tell_if_idle(self, row: dict[str, float]) -> None:
        """Say so if the first step had no gradient at all: then it is likely that none of them will."""
        if row["step"] == 1 and row["grad_norm"] == 0 and self.parallel.is_main:
            tqdm.write(
                "step 1: the gradient is exactly 0, so that nothing changes. Either the objective does not depend on "
                "the video (a cap may be reached), or the video does not on the steps that carry gradient, as on the "
                "last one of DEIS: try gradient.last_steps=2"
            )

    def is_due(self, every: int) -> bool:
        """True if the step that was just taken is one of every so many; 0: never."""
        return every > 0 and self.state.progress.step % every == 0

    def measure_baseline(self) -> None:
        """Measure the model as it is, and save the run's beginning."""
        objective = self.measure("before").objective
        finite = sum(map(math.isfinite, objective))
        if finite < 2:
            raise UsageError(
                f"the reward of a held-out video of the model as it is, untrained, is not finite: {objective}"
            )
        if finite < len(objective) and self.parallel.is_main:
            tqdm.write(f"{len(objective) - finite} of {len(objective)} held-out pairs are left out: not finite before")
        self.state.progress.running = self.state.progress.initial
        self.save()

    def measure_if_due(self) -> None:
        """Measure in the middle of the run."""
        step = self.state.progress.step
        if self.is_due(self.config.validation.every) and 0 < step < self.config.train.steps:
            self.measure(f"step-{step:06d}")
            if self.validation.ends_training and not self.is_due(self.config.checkpoint.every):
                self.save()

    def measure(self, name: str) -> Measurement:
        """Measure the held-out pairs; samples go into a folder of that name."""
        now = self.validation.measure(self.state, name)
        self.observers.row(now.row())
        if self.parallel.is_main:
            self.observers.samples(now.step, self.folder.samples / name, now.prompts)
        return now

    def save(self) -> None:
        """Write a checkpoint."""
        if self.parallel.is_main:
            layout = {"processes": self.parallel.world, "context": self.config.parallel.context}
            step, facts = self.state.progress.step, {"inputs": self.inputs, **layout}
            with self.folder.checkpoint(step, self.config.checkpoint.keep, facts) as path:
                write_state(self.state.state_dict(), path)
            # Not earlier: a run that goes on from the checkpoint before this one may want what was the best there.
            self.validation.forget_worse()
        self.saved = self.state.progress.step
        self.parallel.wait()

    def finish(self) -> Paired | None:
        """Export and measure what was trained, and report."""
        step = self.state.progress.step
        if self.parallel.is_main:
            self.outcome.export()
        if not self.validation.history.has(step):
            self.measure(f"step-{step:06d}")
        result = self.outcome.of_whole_run(self.config.train.steps) if self.parallel.is_main else None
        self.parallel.wait()
        return result

    def finish_early(self, early: Interrupted | LostError) -> None:
        """Save, export and report what there is; nothing is measured any more."""
        if self.validation.measured and self.saved != self.state.progress.step:
            self.save()
        if self.parallel.is_main:
            by = f"by {signal_name(early.number)} " if isinstance(early, Interrupted) else ""
            sentence = self.outcome.of_interrupted_run(self.config.train.steps, by)
            tqdm.write(f"{sentence}; go on by --resume")
        self.parallel.wait()
        self.parallel.end()

    def __str__(self) -> str:
        terms = self.method.objective.terms.items()
        names = ", ".join(f"{t.weight:g} × {name}{' (normalized)' * t.normalize}" for name, t in terms)
        count = sum(p.numel() for p in self.state.trainable.parameters)
        return (
            f"{self.config.model.name}: {count:,} trained weights; objective: {names}; "
            f"{self.parallel.world} process(es) on {self.parallel.device.type}"
        )

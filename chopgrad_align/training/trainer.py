"""The training loop."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..common.errors import Interrupted, UsageError
from ..data.cache import Cache
from ..data.order import mix
from ..evaluation.curves import draw_curves
from ..evaluation.heldout import Paired, paired_where_finite
from ..evaluation.report import write_report
from ..evaluation.sheet import draw_samples
from ..evaluation.witnesses import Witness
from ..sampling.predictions.columns import arguments
from .batches import Batches, held_out_seed, on_device
from .checkpoints import read_state, read_weights, write_state, write_weights
from .config import Config, header, to_yaml
from .data import Data
from .encoded_prompts import encode_prompts
from .fingerprints import fingerprints
from .folder import RunFolder
from .guard import Guard, Verdict, best, exported, remarks
from .history import History
from .measurement import Measurement, comparison, evaluate, joined, pictures, with_nulls
from .methods import DirectGradient, MicroBatch
from .parallel import LostContactError, Replicas
from .phases import Phases
from .prefetch import Prefetched
from .resume import changed_inputs, changed_settings
from .state import TrainState
from .stopping import StopRequests, signal_name

_MOST_SKIPS = 3  # non-finite steps in a row
_SECONDS_TO_BE_ENDED = 5.0


class LostError(UsageError):
    """Steps no longer change anything."""


@dataclass
class Trainer:
    """One run on one process.

    All randomness is a function of the seed, the step and the sample, so that a resumed run is the same run, and that
    the number of processes and the size of micro-batches change rounding only. The exception is what layers draw as
    they run, the masks of `lora.dropout` > 0 and noise that a decoder injects: that is seeded by the step and the
    process, and drawn in the order of the micro-batches, so that results then depend on both numbers.
    """

    config: Config
    data: Data
    pipe: Any
    parallel: Replicas
    shares: list[range]
    batches: Batches
    method: DirectGradient
    witnesses: Mapping[str, Witness]
    guard: Guard
    state: TrainState
    history: History
    folder: RunFolder
    phases: Phases
    requests: StopRequests
    verdicts: list[Verdict] = field(default_factory=list)  # of the guard, on each measurement but the first
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
        if not self.history.measured:
            self.measure_baseline()
        elif not self.history.has(progress.step):  # killed between the checkpoint and its measurement
            self.measure_if_due()
        places = ((step, share) for step in range(progress.step, steps) for share in self.shares)
        with (
            Prefetched(self.batches.micro_batch, places) as micro_batches,
            tqdm(initial=progress.step, total=steps, disable=not self.parallel.is_main, desc="align") as bar,
        ):
            while progress.step < steps and not self.stopped:
                row = self.step(micro_batches)
                self.log(row)
                bar.update()
                bar.set_postfix(reward=f"{row['reward']:.4f}", skipped=progress.skipped)
                self.stop_if_lost(row)
                if progress.step == steps or self.is_due(self.config.checkpoint.every):
                    self.save()
                self.stop_if_asked()
                self.measure_if_due()

    def step(self, micro_batches: Iterator[MicroBatch]) -> dict[str, float]:
        """Take one optimizer step, of this process's part of the batch; returns the row of metrics."""
        state, progress = self.state, self.state.progress
        state.trainable.train()
        torch.manual_seed(mix(self.config.run.seed, progress.step, self.parallel.rank))  # dropout, a decoder's noise
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
            state.schedule.step()
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

    def stop_if_asked(self) -> None:
        """Raise Interrupted if any process was asked to stop; all of them do then, at the same place."""
        if number := self.parallel.greatest(self.requests.number()):
            raise Interrupted(number)

    def is_due(self, every: int) -> bool:
        """Whether the step that was just taken is one of every so many; 0: never."""
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
            if self.stopped and not self.is_due(self.config.checkpoint.every):
                self.save()

    @property
    def stopped(self) -> bool:
        """Whether the guard ended the training."""
        return bool(self.verdicts) and self.verdicts[-1].stop

    def judge(self, place: int) -> Verdict:
        """What the guard says of one of the measurements after the base model's."""
        return self.guard.judge(self.history.baseline, self.history.measured[1:place], self.history.measured[place])

    def measure(self, name: str) -> Measurement:
        """Measure the held-out pairs, and keep the weights if they are the best; samples go into a folder."""
        self.state.trainable.eval()
        validation, objective = self.config.validation, self.method.objective.measured
        with self.state.averaged():
            weights = self.state.trainable.state_dict()
            share = evaluate(
                self.pipe,
                dict(self.method.call),
                self.method.prediction,
                objective,
                self.witnesses,
                self.batches,
                validation.pairs,
                validation.batch,
                (self.parallel.rank, self.parallel.world),
                (self.folder.samples / name, validation.videos, self.config.model.fps),
                self.requests.number,
            )
        self.stop_if_asked()
        scores, progress = joined(self.parallel.gather_objects(share)), self.state.progress
        progress.initial = progress.initial or objective.first_statistics(scores.terms)
        raw = {name: torch.tensor(values, dtype=torch.float64) for name, values in scores.terms.items()}
        values = objective.values(raw, scores.weights, progress.initial)
        now = Measurement(
            step=progress.step,
            objective=torch.stack([*values.values()]).sum(0).tolist(),
            terms=scores.terms,
            witnesses=self.history.values(
                self.witnesses, scores.kept, self.data.groups(validation.pairs, validation.seeds)
            ),
            prompts=scores.prompts,
            conditions=self.data.conditions(validation.pairs, validation.seeds),
        )
        measured = [*self.history.measured, now]
        if len(measured) > 1:
            self.verdicts.append(self.guard.judge(measured[0], measured[1:-1], now))
        if self.parallel.is_main:
            if best(measured, self.verdicts) is now:
                with self.folder.best_weights(now.step) as path:  # first, so that what is said to be the best is there
                    write_weights(weights, path)
            for sentence in self.verdicts[-1].sentences.values() if self.verdicts else ():
                tqdm.write(f"guard: {sentence}")
            self.folder.write(self.folder.samples / "prompts.json", json.dumps(scores.prompts))
        self.history.add(now, write=self.parallel.is_main)
        self.log(now.row())
        return now

    def log(self, row: dict[str, float]) -> None:
        """Write a row of metrics."""
        if self.parallel.is_main:
            self.folder.append(row)
        self.parallel.track(row)

    def save(self) -> None:
        """Write a checkpoint."""
        if self.parallel.is_main:
            step, facts = self.state.progress.step, {"inputs": self.inputs, "processes": self.parallel.world}
            with self.folder.checkpoint(step, self.config.checkpoint.keep, facts) as path:
                write_state(self.state.state_dict(), path)
            # Not earlier: a run that goes on from the checkpoint before this one may want what was the best there.
            self.forget_worse()
        self.saved = self.state.progress.step
        self.parallel.wait()

    def forget_worse(self) -> None:
        """Remove kept weights that are the best no more."""
        found = best(self.history.measured, self.verdicts)
        self.folder.forget_best(but=found.step if found else None)

    def export(self, weights: Path | None = None) -> None:
        """Export the trained weights, or others."""
        if weights is not None:
            self.state.trainable.load_state_dict(read_weights(weights))
        averaged = self.state.averaged() if weights is None else nullcontext()
        with averaged, self.folder.exporting() as path:
            self.state.trainable.export(path)

    def finish(self) -> Paired | None:
        """Measure what was trained, export it or the best that was measured before, and report."""
        step, steps, measured = self.state.progress.step, self.config.train.steps, self.history.measured
        if self.parallel.is_main:
            self.export()
        if not self.history.has(step):
            self.measure(f"step-{step:06d}")
        after, remark = exported(measured, self.verdicts, self.config.checkpoint.export)
        if self.parallel.is_main:
            if after.step != step:
                weights = self.folder.weights(after.step)
                if weights is None:  # the bounds were others when it was measured
                    after, remark = (
                        measured[-1],
                        f"the best weights, of step {after.step}, are gone: lora/ holds the last",
                    )
                else:
                    self.export(weights)
            self.forget_worse()
            ended = f"training ended at step {step} of {steps}" if step < steps else ""
            self.report(after, ended, remark)
        self.parallel.wait()
        before = self.history.baseline
        return (
            paired_where_finite(before.objective, after.objective, after.conditions) if self.parallel.is_main else None
        )

    def finish_early(self, early: Interrupted | LostError) -> None:
        """Save, export and report what there is; nothing is measured any more."""
        step, measured = self.state.progress.step, self.history.measured
        if measured and self.saved != step:
            self.save()
        if self.parallel.is_main:
            self.export()
            ended = f"by {signal_name(early.number)} " if isinstance(early, Interrupted) else ""
            after = measured[-1] if len(measured) > 1 else None
            last = f"last measured at step {after.step}" if after else "not measured after training"
            remark = (
                f"training ended early {ended}after step {step} of {self.config.train.steps}: lora/ holds the weights "
                f"of that step, and held-out pairs were {last}"
            )
            self.report(after, remark)
            tqdm.write(f"{remark}; go on by --resume")
        self.parallel.wait()
        self.parallel.end()

    def report(self, after: Measurement | None, *sentences: str) -> None:
        """Write the comparison of the base model with a later measurement, if there is one, and what shows it."""
        held: dict[str, Any] = {"remarks": [text for text in (*remarks(self.verdicts), *sentences) if text]}
        if after is not None:
            held |= comparison(self.history.measured, after)
            held["seeds"] = [held_out_seed(i) for i in range(len(after.prompts))]
            held["bounds"] = {name: [b.least, b.most] for name, b in self.guard.bounds.items()}
            self.folder.show_as_after(after.step)
        self.folder.write(self.folder.held_out, json.dumps(with_nulls(held)))
        for what, make in (("curves.png", draw_curves), ("samples.png", draw_samples), ("the report", write_report)):
            with pictures(what):
                make(self.folder.path)

    def prepare(self, resume: bool) -> None:
        """Encode prompts, move the pipeline to its device, and take up where the last checkpoint was."""
        if self.config.model.encode_prompts_once:
            # The rest of the pipeline waits on the CPU.
            pair = self.batches.held_out(range(1))
            inputs = {**self.method.call, **pair.inputs, **arguments(self.method.prediction.columns, pair.videos)}
            prompts = self.batches.prompts(self.config.train.steps)
            encode_prompts(self.pipe, inputs, prompts, Cache(self.config.data.cache), self.parallel.device)
        self.pipe.to(self.parallel.device)
        self.inputs = self.parallel.on_main(lambda: fingerprints(self.config))
        if resume:
            self.restore()
        if self.parallel.is_main:
            self.folder.checkpoints.clean()
            self.folder.write(self.folder.config, header(self.config) + to_yaml(self.config))
        self.parallel.start_trackers()

    def restore(self) -> None:
        """Take up where the last whole checkpoint was, with what the config changes; with none, at the beginning."""
        step, changed = self.parallel.on_main(self.find_checkpoint)
        if step is not None:
            self.state.load_state_dict(read_state(self.folder.checkpoints.path(step)))
            self.history.load(step)
            self.verdicts = [self.judge(place) for place in range(1, len(self.history.measured))]
            self.saved = step
        if changed:
            self.state.progress.skipped_in_a_row = 0
            self.state.change_learning_rate(self.config.train.learning_rate)
        if self.parallel.is_main:
            rows = -1 if step is None else step
            self.folder.rewind(rows)
            self.history.rewind(rows)

    def find_checkpoint(self) -> tuple[int | None, dict[str, Any]]:
        """The step of the last whole checkpoint, and what settings change; later checkpoints are named."""
        folder = self.folder
        step, left_out = folder.checkpoints.newest(self.state.state_dict()["weights"])
        for sentence in left_out:
            tqdm.write(f"{sentence}; going on from step {step or 0}")
        if step is None:
            if folder.last_row() > 0:
                raise UsageError(
                    f"--resume: no checkpoint in {folder.path} is whole; start again in another run.folder=…"
                )
            return None, {}
        changed, inputs = changed_settings(self.config, folder), folder.checkpoints.facts(step).get("inputs", {})
        if noted := changed | dict.fromkeys(changed_inputs(inputs, self.inputs), "another content"):
            folder.note_resume(step, noted)
        return step, changed

    def __str__(self) -> str:
        terms = self.method.objective.terms.items()
        names = ", ".join(f"{t.weight:g} × {name}{' (normalized)' * t.normalize}" for name, t in terms)
        count = sum(p.numel() for p in self.state.trainable.parameters)
        return (
            f"{self.config.model.name}: {count:,} trained weights; objective: {names}; "
            f"{self.parallel.world} process(es) on {self.parallel.device.type}"
        )

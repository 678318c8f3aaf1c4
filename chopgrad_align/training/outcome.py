"""The results of a run: the exported weights and the report, whether it came to its end or not."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..evaluation.curves import draw_curves
from ..evaluation.heldout import Paired, paired_where_finite
from ..evaluation.measurement import Measurement
from ..evaluation.report import write_report
from ..evaluation.sheet import draw_samples
from .checkpoints import read_weights
from .folder import RunFolder
from .guard import exported
from .measurement import pictures
from .state import TrainState
from .validation import Validation


@dataclass(frozen=True)
class Outcome:
    """The writer of a run's results, on the main process.

    Attributes:
        state: Holds the weights.
        validation: Measured them.
        folder: Where the results go.
        wanted: Which of the measured weights are exported.
    """

    state: TrainState
    validation: Validation
    folder: RunFolder
    wanted: Literal["best", "last"]

    def export(self, weights: Path | None = None) -> None:
        """Export the trained weights, or those of a folder."""
        if weights is not None:
            self.state.trainable.load_state_dict(read_weights(weights))
        averaged = self.state.averaged() if weights is None else nullcontext()
        with averaged, self.folder.exporting() as path:
            self.state.trainable.export(path)

    def of_whole_run(self, steps: int) -> Paired | None:
        """Export the last weights or the best ones, and report them; the last ones have been measured.

        Returns:
            The comparison of the base model with what was exported; None if too few scores of it are finite.
        """
        step, measured = self.state.progress.step, self.validation.measured
        after, remark = exported(measured, self.validation.verdicts, self.wanted)
        if after.step != step:
            weights = self.folder.weights(after.step)
            if weights is None:  # the bounds were others when it was measured
                remark = f"the best weights, of step {after.step}, were not kept: lora/ holds the last"
                after = measured[-1]
            else:
                self.export(weights)
        self.validation.forget_worse()
        ended = f"training ended at step {step} of {steps}" if step < steps else ""
        self.report(after, ended, remark)
        return paired_where_finite(measured[0].objective, after.objective, after.conditions)

    def of_interrupted_run(self, steps: int, by: str) -> str:
        """Export the last weights, and report what was measured before; returns a sentence about it."""
        self.export()
        measured = self.validation.measured
        after = measured[-1] if len(measured) > 1 else None
        last = f"last measured at step {after.step}" if after else "not measured after training"
        remark = (
            f"training ended early {by}after step {self.state.progress.step} of {steps}: lora/ holds the weights "
            f"of that step, and held-out pairs were {last}"
        )
        self.report(after, remark)
        return remark

    def report(self, after: Measurement | None, *sentences: str) -> None:
        """Write the comparison of the base model with a later measurement, if there is one, and what shows it."""
        held_out = self.validation.compared(after, [text for text in sentences if text])
        self.folder.write(self.folder.held_out, json.dumps(held_out))
        if after is not None:
            with pictures("samples/after"):
                self.folder.show_as_after(after.step)
        for what, make in (("curves.png", draw_curves), ("samples.png", draw_samples), ("the report", write_report)):
            with pictures(what):
                make(self.folder.path)

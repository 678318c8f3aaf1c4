"""The protocol of training methods, and the micro-batch that they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ...objective.objective import Objective
from ...objective.statistics import Statistics
from ...sampling.predictions.protocol import Prediction, Videos


@dataclass(frozen=True)
class MicroBatch:
    """The part of a batch that is computed at a time.

    Attributes:
        inputs: Of the pipeline's call, for these videos: prompts or their embeddings, images, generators.
        prompts: What the rewards are told.
        frame_seeds: Decide which frames random samplers choose, one a video.
        weights: How much each term counts in each video; default 1.
        seeds: Of what the prediction draws, one a video.
        steps_seed: Of what a sampling policy draws; the same for all videos of a batch.
        videos: Of data with clips: `(B, F, C, H, W)` in [0, 1] for each role.
        fps: Frames a second, one a video; None where they are not known.
        rows: Columns of the row of the data that each video is of.
    """

    inputs: Mapping[str, Any]
    prompts: list[str]
    frame_seeds: list[int]
    weights: Mapping[str, list[float]] | None = None
    seeds: Sequence[int] = ()
    steps_seed: int = 0
    videos: Videos = field(default_factory=dict)
    fps: Sequence[float | None] = ()
    rows: Sequence[Mapping[str, Any]] = ()


class Method(Protocol):
    """A way to train; holds the pipeline and the objective, and nothing that changes from step to step."""

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        ...

    @property
    def call(self) -> Mapping[str, Any]:
        """Arguments of the pipeline's call that are the same for all videos."""
        ...

    @property
    def prediction(self) -> Prediction:
        """The way in which the pipeline's call predicts a video."""
        ...

    @property
    def objective(self) -> Objective:
        """The terms that are to rise."""
        ...

    def accumulate(self, batch: MicroBatch, statistics: Mapping[str, Statistics]) -> Tensor:
        """Add the gradient of a micro-batch to `.grad` of the trained weights.

        Args:
            batch: On the pipeline's device.
            statistics: Running ones, of each normalized term.

        Returns:
            A row for each video, float32: the objective, the score of each term, the value of each term.
        """
        ...

"""One micro-batch of a training step: videos are sampled with a gradient, scored, and the gradient is pulled back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backprop import Backprop
from ..objective import Objective, Statistics
from ..rollout import differentiable
from ..steps import LastSteps
from .partial import decode_read


@dataclass(frozen=True)
class MicroBatch:
    """What differs from one micro-batch to the next.

    Attributes:
        inputs: Of the pipeline's call, for these videos: prompts or their embeddings, images, generators.
        prompts: What the rewards are told.
        frame_seeds: Decide which frames random samplers choose, one a video.
        weights: How much each term counts in each video.
    """

    inputs: Mapping[str, Any]
    prompts: list[str]
    frame_seeds: list[int]
    weights: Mapping[str, list[float]]


@dataclass(frozen=True)
class Trainee:
    """What is trained, and how: the same in every step.

    Attributes:
        call: Arguments of the pipeline's call.
        steps: Denoising steps that carry gradient.
        backprop: How to backpropagate through the decoder.
        batch_size: Videos for one optimizer step, over all processes; the loss is their mean.
        phases: A context for each named part, for what measures them.
        decode: How to decode; `decode_read` with all its arguments.
    """

    pipe: Any
    call: Mapping[str, Any]
    objective: Objective
    steps: LastSteps
    backprop: Backprop
    batch_size: int
    phases: Callable[[str], AbstractContextManager[None]]
    decode: Callable[..., Tensor] = decode_read

    def accumulate(self, batch: MicroBatch, statistics: Mapping[str, Statistics]) -> Tensor:
        """Add the gradient of a micro-batch to the trained weights.

        Args:
            statistics: Of each normalized term.

        Returns:
            A row for each video, float32: the objective, the score of each term, the value of each term.
        """

        read = functools.partial(self.objective.frames_read, seeds=batch.frame_seeds)

        def decode(*args: Any, **kwargs: Any) -> Tensor:
            with self.phases("decoding"):
                return self.decode(*args, read=read, expected=self.call.get("num_frames"), **kwargs)

        with self.phases("sampling"), differentiable(self.pipe, self.steps, self.backprop, decode) as sample:
            video = sample(**batch.inputs, **self.call, output_type="pt").frames
        with self.phases("reward"):
            scores = self.objective.scores(video, batch.prompts, batch.frame_seeds)
            values = self.objective.values(scores, batch.weights, statistics)
            total = torch.stack([*values.values()]).sum(0)
        with self.phases("backward"):
            (-total.sum() / self.batch_size).backward()
        columns = [total, *scores.values(), *values.values()]
        return torch.stack([column.detach().float() for column in columns], 1)

"""Predict by the pipeline's whole sampler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...common.errors import UsageError
from ...objective.terms import Reference
from ..initial_noise import Noise, starting_from
from .columns import arguments
from .latents import continued, encode, frame_axis
from .probability_paths import RectifiedFlow, path_of
from .protocol import PreparedCall, Videos


@dataclass(frozen=True)
class Sample:
    """Sampling from noise, by the pipeline's own sampler; the gradient reaches the steps of the sampling policy.

    Args:
        columns: Arguments of the pipeline's call, each with its role of the data; see `arguments`.
        noise: What to start from instead of the pipeline's noise.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    noise: Noise | None = None

    @contextmanager
    def prepare(
        self, pipe: Any, videos: Videos, seeds: Sequence[int], training: bool, latents: bool
    ) -> Iterator[PreparedCall]:
        """See `Prediction.prepare`."""
        reference = Reference(videos.get("target"), videos.get("mask"))
        inputs = arguments(self.columns, videos)
        if "context" in videos:
            inputs["callback_on_step_end"] = _replacing(pipe, encode(pipe, videos["context"]), seeds)
        with nullcontext() if self.noise is None else starting_from(pipe, self.noise, frame_axis(pipe)):
            yield PreparedCall(inputs, lambda: reference)


def _replacing(pipe: Any, known: Tensor, seeds: Sequence[int]) -> Any:
    """Callback that keeps the first latents, those of frames that are known, at the noise of each step."""
    path, axis = path_of(pipe.scheduler), frame_axis(pipe)
    if not isinstance(path, RectifiedFlow):
        raise UsageError("long videos by mode=sample need a model of flow matching; use mode=one_step")
    noise = torch.stack(
        [torch.randn(known.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    ).to(known)

    def replace(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # Not of the loop's own count, which starts at 0 in the middle of the schedule too.
        noised = path.noised(known, noise, float(pipe.scheduler.sigmas[pipe.scheduler.step_index]))
        return {"latents": continued(noised.to(tensors["latents"]), tensors["latents"], axis)}

    return replace

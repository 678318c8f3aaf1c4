"""A single call of the denoiser by the pipeline's own code: a scheduler of a single step, to the clean latents."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...objective.terms import Reference
from .latents import continued, frame_axis
from .probability_paths import ProbabilityPath
from .protocol import Videos


class _Call:
    """The one step, as its scheduler saw it."""

    inputs: Mapping[str, Any] = {"num_inference_steps": 1}
    clean: Tensor
    output: Tensor

    def reference(self, videos: Videos, true: Tensor | None, true_output: Tensor | None) -> Reference:
        return Reference(
            videos.get("target"),
            videos.get("mask"),
            None if true is None else (self.clean, true),
            None if true_output is None else (self.output, true_output),
        )


@functools.cache
def _scheduler() -> type:
    """Make the class once, and not with each call: it would be freed late, and with it the tensors that it knows."""
    from diffusers import SchedulerMixin

    class OneStepScheduler(SchedulerMixin):
        """The part of a scheduler that pipelines use."""

        order, init_noise_sigma = 1, 1.0

        def __init__(
            self, config: Any, path: ProbabilityPath, time: float, known: Tensor | None, axis: int, call: _Call
        ) -> None:
            self.config, self.sigmas = config, torch.tensor([time, 0.0])
            self._path, self._time, self._known, self._axis, self._call = path, time, known, axis, call

        def set_timesteps(self, num_inference_steps: int = 1, device: Any = None, sigmas: Any = None) -> None:
            self.timesteps = torch.tensor([self._path.timestep(self._time)], device=device)

        def set_begin_index(self, begin_index: int = 0) -> None:
            pass

        def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
            return sample

        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
            self._call.output = model_output
            # In float32 or more, as schedulers do.
            clean = self._path.clean(model_output.to(sample.dtype), sample, self._time)
            self._call.clean = clean if self._known is None else continued(self._known.to(clean), clean, self._axis)
            return (self._call.clean,)

    return OneStepScheduler


@contextmanager
def one_call(pipe: Any, path: ProbabilityPath, time: float, known: Tensor | None = None) -> Iterator[_Call]:
    """Within the context the pipeline's sampler takes one step, from `time` to the clean latents.

    Args:
        pipe: A diffusers pipeline.
        path: The path of its model.
        time: In (0, 1].
        known: The first clean latents, in the pipeline's layout; they take the place of the predicted ones.
    """
    before, call = pipe.scheduler, _Call()
    pipe.scheduler = _scheduler()(before.config, path, time, known, frame_axis(pipe), call)
    try:
        yield call
    finally:
        pipe.scheduler = before

"""Repetition of the last denoising step from clean latents that are noised anew (DRaFT-LV, arXiv 2309.17400).

What a pipeline does between its denoiser and its scheduler is inside its loop. To repeat the last step, the pipeline is
therefore called once more; until the last step its denoiser returns a tensor of the right shape without running, and
its scheduler lets the latents be. Then it hands over the noised clean latents, and the last step is the pipeline's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ..common.errors import UsageError
from .gradient_steps import GradientSteps
from .randomness import restore, states


class RecordedLastStep:
    """Perform the steps of a rollout, and keep what a repetition of the last one needs.

    Attributes:
        clean: The latents after the last step, detached.
    """

    clean: Tensor

    def __init__(self, steps: GradientSteps) -> None:
        self.steps, self._loop = steps, steps.loop
        self._seen = -1  # the iteration that the scheduler was called in last
        self._outputs: dict[nn.Module, Any] = {}
        self._result: Any = None
        self._timestep: Any = None
        self._index: int | None = None
        self._random: list[Tensor] = []

    def step(self, original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the place of `scheduler.step`."""
        if self.steps.plan.repeats:
            self._expect_single_steps(scheduler)
        last = scheduler is self._loop.scheduler and self._loop.is_last
        if last:
            self._index = getattr(scheduler, "step_index", None)
            self._random = states(self.steps.generator)
            self._timestep = (
                inspect.signature(type(scheduler).step).bind(scheduler, *args, **kwargs).arguments["timestep"]
            )
        result = self.steps.step(original, scheduler, *args, **kwargs)
        if last:
            self._result = tree_map_only(Tensor, Tensor.detach, result)
            self.clean = tree_leaves(self._result)[0]
        return result

    def forward(self, original: Callable[..., Any], denoiser: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Take the place of `denoiser.forward`."""
        output = self.steps.forward(original, denoiser, *args, **kwargs)
        self._outputs[denoiser] = tree_map_only(Tensor, Tensor.detach, output)
        return output

    def _expect_single_steps(self, scheduler: Any) -> None:
        """Raise a UsageError where the last step cannot be repeated alone."""
        single = self._loop.iteration != self._seen
        if self._loop.section > 0 or single is not (scheduler is self._loop.scheduler):
            raise UsageError(
                "LowVariance repeats the last step of a single loop that calls the pipeline's scheduler once a step; "
                "this pipeline samples otherwise: use LastSteps(1)"
            )
        if not any(hasattr(scheduler, method) for method in ("scale_noise", "add_noise")):
            raise UsageError(
                f"LowVariance: {type(scheduler).__name__} cannot add noise to clean latents; use another scheduler, or "
                "LastSteps(1)"
            )
        self._seen = self._loop.iteration

    def output(self, denoiser: nn.Module) -> Any:
        """Some output of the denoiser, which has the shape and the type of all."""
        return self._outputs[denoiser]

    def result(self, latents: Tensor) -> Any:
        """The scheduler's result if the latents were these, in a tuple or object of its own; all else in it is None."""
        leaves, structure = tree_flatten(self._result)
        return tree_unflatten([latents, *[None] * (len(leaves) - 1)], structure)

    def draw_again(self) -> None:
        """Let the scheduler draw what it drew in the last step."""
        restore(self.steps.generator, self._random)

    def noised(self, scheduler: Any, noise: Tensor) -> Tensor:
        """Noise the clean latents to the level of the last step, and set the scheduler to that step."""
        if self._index is not None:
            scheduler._step_index = self._index
        times = torch.as_tensor(self._timestep).reshape(1).to(self.clean.device)
        if hasattr(scheduler, "scale_noise"):  # of flow matching
            return scheduler.scale_noise(sample=self.clean, timestep=times, noise=noise)
        return scheduler.add_noise(original_samples=self.clean, noise=noise, timesteps=times)


class RepeatedLastStep:
    """Perform the last step of a recorded rollout on fresh noise, and none of those before it.

    Args:
        steps: Of the call that repeats it.
        record: Of the rollout.
        noise: Of the shape of its latents.
    """

    def __init__(self, steps: GradientSteps, record: RecordedLastStep, noise: Tensor) -> None:
        self.steps, self._loop = steps, steps.loop
        self._record, self._noise = record, noise

    def step(self, original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the place of `scheduler.step`."""
        if scheduler is self._loop.scheduler and self._loop.is_last:
            self._record.draw_again()
        if scheduler is not self._loop.scheduler or self._loop.is_last:
            return self.steps.step(original, scheduler, *args, **kwargs)
        self._loop.take_step()
        is_next = self._loop.iteration == self._loop.announced - 2
        return self._record.result(self._record.noised(scheduler, self._noise) if is_next else self._record.clean)

    def forward(self, original: Callable[..., Any], denoiser: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Take the place of `denoiser.forward`."""
        self.steps.predict()
        if self._loop.is_last:
            return self.steps.forward(original, denoiser, *args, **kwargs)
        return self._record.output(denoiser)

"""The denoising steps of one rollout, with a graph where a sampling policy wants one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..common.errors import UsageError
from .guidance_branches import GuidanceBranches
from .recomputation import recomputed
from .sampling_loop import SamplingLoop
from .steps import StepPlan, StepPolicy, plan_of

_LATENTS = ("hidden_states", "audio_hidden_states", "sample")  # arguments of denoisers in diffusers


class GradientSteps:
    """Run a pipeline's denoiser with a graph in the steps of a plan, and all else from the first of them on.

    Its methods take the place of those of the scheduler and the denoisers; see `replaced`.

    Args:
        pipe: A diffusers pipeline.
        policy: Is asked for a plan when the denoiser is first called, which is when the number of steps is known.
        seed: Of the plan.
    """

    def __init__(self, pipe: Any, policy: StepPolicy, seed: int) -> None:
        self.loop = SamplingLoop(pipe)
        self.branches = GuidanceBranches()
        self._policy, self._seed = policy, seed
        self._plan: StepPlan | None = None
        self._controlnet = pipe.components.get("controlnet")
        self._wanted = torch.is_grad_enabled()

    @property
    def plan(self) -> StepPlan:
        """The policy's plan for this loop."""
        if self._plan is None:
            self._plan = plan_of(self._policy, self.loop.num_steps, self._seed)
        return self._plan

    def step(self, original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the place of `scheduler.step`."""
        if scheduler is self.loop.scheduler and self._carries_gradient() and not self.plan.unconditional:
            self.branches.detach(scheduler, args, kwargs)
        result = original(scheduler, *args, **kwargs)
        if scheduler is self.loop.scheduler:
            self.advance()
        return result

    def advance(self) -> None:
        """Note that a call of the scheduler has ended."""
        self.loop.calls += 1
        self._begin_when_due()

    def forward(self, original: Callable[..., Any], denoiser: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Take the place of `denoiser.forward`."""
        self.loop.expect_more()
        self._begin_when_due()
        if not self._carries_gradient() or (self.branches.unconditional and not self.plan.unconditional):
            with torch.no_grad():  # the policy takes this prediction for a constant
                return original(denoiser, *args, **kwargs)
        if self.plan.detach_input:
            args, kwargs = _with_constant_latents(denoiser, args, kwargs)
        output = recomputed(original, denoiser, args, kwargs)
        if not self.plan.unconditional and denoiser is not self._controlnet:  # whose output ends in the denoiser's
            self.branches.predicted(output)
        return output

    def _carries_gradient(self) -> bool:
        return self._wanted and self.loop.step in self.plan.steps

    def _begin_when_due(self) -> None:
        if self._wanted and self.loop.step >= min(self.plan.steps) and not torch.is_grad_enabled():
            # For the rest of the pipeline's own code too, as guidance. No latents need to be detached: those before
            # this moment never had a graph.
            torch.set_grad_enabled(True)
            # Older autocast would use the weights again that it cast without a graph (pytorch issue 65766).
            torch.clear_autocast_cache()


def _with_constant_latents(denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a denoiser's call, in which the latents are detached; a controlnet's output is not."""
    given = inspect.signature(type(denoiser).forward).bind(denoiser, *args, **kwargs)
    names = [name for name in _LATENTS if name in given.arguments]
    if not names:
        raise UsageError(
            f"rollout: detach_input=True: {type(denoiser).__name__} has none of the arguments {', '.join(_LATENTS)}, "
            "so that it is not known which are the latents; use detach_input=False"
        )
    given.arguments.update({name: given.arguments[name].detach() for name in names})
    return given.args[1:], given.kwargs

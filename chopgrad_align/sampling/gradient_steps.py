"""The denoising steps of one rollout, with a graph where a sampling policy wants one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..common.errors import UsageError
from .guidance_branches import GuidanceBranches
from .randomness import Generators, step_drawing_from
from .recomputation import recomputed
from .sampling_loop import SamplingLoop
from .steps import StepPlan, StepPolicy, plan_of

Observe = Callable[[Callable[..., Any], nn.Module, tuple, dict[str, Any], Any], None]
"""Is told of a denoiser's call that has a graph: its own forward, itself, the arguments, and what it returned."""

_LATENTS = {"hidden_states", "audio_hidden_states", "sample"}  # arguments of denoisers in diffusers


class GradientSteps:
    """Run a pipeline's denoiser with a graph in the steps of a plan, and all else from the first of them on.

    Its methods take the place of those of the scheduler and the denoisers; see `replaced`.

    Args:
        pipe: A diffusers pipeline.
        policy: Is asked for a plan when the denoiser is first called, which is when the number of steps is known.
        seed: Of the plan.
        observe: Is told of the denoiser's calls that have a graph; not of a controlnet's.
        generator: Of the call; the scheduler draws from it.
    """

    def __init__(
        self,
        pipe: Any,
        policy: StepPolicy,
        seed: int,
        observe: Observe | None = None,
        generator: Generators = None,
    ) -> None:
        self.loop = SamplingLoop(pipe)
        self.branches = GuidanceBranches()
        self.generator = generator
        self._policy, self._seed, self._observe = policy, seed, observe
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
        result = step_drawing_from(self.generator, original, scheduler, *args, **kwargs)
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
            return self._constant(original, denoiser, args, kwargs)
        if self.plan.detach_input:
            args, kwargs = with_constant_latents(denoiser, args, kwargs)
        output = recomputed(original, denoiser, args, kwargs)
        if denoiser is self._controlnet:  # whose output ends in the denoiser's
            return output
        if self._observe is not None:
            self._observe(original, denoiser, args, kwargs, output)
        if not self.plan.unconditional:
            self.branches.predicted(output)
        return output

    def _constant(self, original: Callable[..., Any], denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A prediction that the policy takes for a constant."""
        with torch.no_grad():
            output = original(denoiser, *args, **kwargs)
        if torch.is_grad_enabled():
            _forget_casts()
        return output

    def _carries_gradient(self) -> bool:
        return self._wanted and self.loop.step in self.plan.steps

    def _begin_when_due(self) -> None:
        if self._wanted and self.loop.step >= min(self.plan.steps) and not torch.is_grad_enabled():
            # For the rest of the pipeline's own code too, as guidance. No latents need to be detached: those before
            # this moment never had a graph.
            torch.set_grad_enabled(True)
            _forget_casts()


def _forget_casts() -> None:
    # Older autocast would use the weights again that it cast without a graph (pytorch issue 65766).
    torch.clear_autocast_cache()


def with_constant_latents(denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Detach the latents among the arguments of a denoiser's call; a controlnet's output keeps its graph."""
    names = [*inspect.signature(type(denoiser).forward).parameters][1 : len(args) + 1]
    if not {*names, *kwargs} & _LATENTS:
        raise UsageError(
            f"rollout: detach_input=True: the call of {type(denoiser).__name__} has none of the arguments "
            f"{', '.join(sorted(_LATENTS))}, so that it is not known which are the latents; use detach_input=False"
        )
    # Each stays where it is, since decorators of `forward` read arguments by name.
    positional = (value.detach() if name in _LATENTS else value for name, value in zip(names, args, strict=True))
    return (*positional,), {key: value.detach() if key in _LATENTS else value for key, value in kwargs.items()}

"""The denoising steps of one rollout, with a graph where a sampling policy wants one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..common.errors import UsageError
from .checkpointing import Checkpointing
from .denoisers import denoisers_of
from .guidance_branches import GuidanceBranches
from .key_value_cache import KeyValueCache
from .randomness import Generators, step_drawing_from
from .sampling_loop import SamplingLoop
from .steps import StepPlan, StepPolicy, plan_of

Observe = Callable[[Callable[..., Any], nn.Module, tuple, dict[str, Any], Any], None]
"""Is told of a denoiser's call that has a graph: its own forward, itself, the arguments, and what it returned."""

_LATENTS = frozenset(  # arguments of denoisers in diffusers
    (
        "hidden_states",
        "audio_hidden_states",
        "sample",
        "latents",  # of a controlnet
        "vision_tokens",
        "sound_tokens",
        "action_tokens",
    )
)


class GradientSteps:
    """Run a pipeline's denoiser with a graph in the steps of a plan, and all else from the first of them on.

    Its methods take the place of those of the scheduler and the denoisers; see `replaced`.

    Args:
        pipe: A diffusers pipeline.
        policy: Is asked for a plan when a section begins, which is when its number of steps is known.
        seed: Of the plan.
        observe: Is told of the denoiser's calls that have a graph; not of a controlnet's.
        generator: Of the call; the scheduler draws from it.
        checkpointing: What is kept of the calls that have a graph.

    Raises:
        UsageError: The policy checkpoints blocks, and a denoiser does not know which.
    """

    plan: StepPlan
    """The policy's plan for the section that is under way."""

    def __init__(
        self,
        pipe: Any,
        policy: StepPolicy,
        seed: int,
        observe: Observe | None = None,
        generator: Generators = None,
        checkpointing: Checkpointing = Checkpointing(),  # noqa: B008 (frozen)
    ) -> None:
        self.loop = SamplingLoop(pipe)
        self.branches = GuidanceBranches()
        self.generator = generator
        self._pipe, self._policy, self._seed, self._observe = pipe, policy, seed, observe
        self._planned = -1  # the section that `plan` is of
        self._cache = KeyValueCache()
        self._controlnet = pipe.components.get("controlnet")
        self._checkpointing = checkpointing
        for denoiser in denoisers_of(pipe).values():
            checkpointing.expect_blocks(denoiser)
        self._wanted, self._began = torch.is_grad_enabled(), False

    @property
    def steps(self) -> GradientSteps:
        """Itself: see `Sampling`."""
        return self

    def begin(self, original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the place of `scheduler.set_timesteps`."""
        result = original(scheduler, *args, **kwargs)
        self.loop.begin()
        return result

    def step(self, original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the place of `scheduler.step`."""
        self.loop.take_step()
        if self._wanted and self.loop.step is not None and not self.plan.unconditional:
            self.branches.detach(scheduler, args, kwargs)
        return step_drawing_from(self.generator, original, scheduler, *args, **kwargs)

    def predict(self) -> None:
        """Note that a denoiser is called, and let the pipeline's own code record a graph from the first call on.

        Guidance and updates then have one as soon as a prediction has, and nothing before that has any: constants are
        predicted without. (Not from that prediction on: SkyReels V2 goes on with views of its latents, which may not
        have been made in another mode.)
        """
        self.loop.predict()
        if self.loop.section > self._planned:
            self.plan = plan_of(self._policy, self.loop.num_steps, self._seed)
            self._planned = self.loop.section
        if self._wanted and self.loop.step is not None and not torch.is_grad_enabled():
            torch.set_grad_enabled(True)
            _forget_casts()
        self._began = self._began or self._carries_gradient()

    def forward(self, original: Callable[..., Any], denoiser: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Take the place of `denoiser.forward`."""
        self.predict()
        if self.loop.step is None:
            return self._cache.fill(lambda: self._constant(original, denoiser, args, kwargs), denoiser)
        if self._wanted and self.plan.detach_input:  # in all steps, so that the first one says if it cannot be done
            args, kwargs = with_constant_latents(denoiser, args, kwargs)
        if self.branches.unconditional and not self.plan.unconditional:
            return self._constant(original, denoiser, args, kwargs)
        run = self._differentiated if self._carries_gradient() else self._constant
        output = run(original, denoiser, args, kwargs)
        if self._wanted and denoiser is not self._controlnet and not self.plan.unconditional:
            self.branches.predicted(output)
        return output

    def expect_end(self) -> None:
        """Check, after the call, that it took the steps that it announced, and some that carry gradient.

        Raises:
            UsageError: It did not.
        """
        self.loop.expect_end()
        if self.loop.section < 0:
            raise UsageError(f"rollout: {type(self._pipe).__name__} took 0 steps; call it within the context")
        if self._wanted and not self._began:
            raise UsageError(
                f"rollout: {self._policy!r}: {type(self._pipe).__name__} sampled {self.loop.section + 1} section(s), "
                f"and none of those that were chosen; choose from 0 to {self.loop.section}"
            )

    def _differentiated(
        self, original: Callable[..., Any], denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """A prediction with a graph."""
        # Some pipelines write into their latents after the call (Kandinsky 5), which is run again on what it was given.
        args, kwargs = _with(_LATENTS, Tensor.clone, denoiser, args, kwargs)
        output = self._checkpointing.call(original, denoiser, args, kwargs, self._cache.refill())
        if self._observe is not None and denoiser is not self._controlnet:  # whose output ends in the denoiser's
            self._observe(self._checkpointing.forward(original), denoiser, args, kwargs, output)
        return output

    def _constant(self, original: Callable[..., Any], denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A prediction that the policy takes for a constant."""
        with torch.no_grad():
            output = original(denoiser, *args, **kwargs)
        if torch.is_grad_enabled():
            _forget_casts()
        return output

    def _is_chosen(self) -> bool:
        if self.loop.step is None:
            return False
        return self.plan.sections is None or self.loop.section in self.plan.sections

    def _carries_gradient(self) -> bool:
        return self._wanted and self._is_chosen() and self.loop.step in self.plan.steps


def _forget_casts() -> None:
    # Older autocast would use the weights again that it cast without a graph (pytorch issue 65766).
    torch.clear_autocast_cache()


def with_constant_latents(denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Detach the latents among the arguments of a denoiser's call; a controlnet's output keeps its graph."""
    if not {*_positional(denoiser, args), *kwargs} & _LATENTS:
        raise UsageError(
            f"rollout: detach_input=True: the call of {type(denoiser).__name__} has none of the arguments "
            f"{', '.join(sorted(_LATENTS))}, so that it is not known which are the latents; use detach_input=False"
        )
    return _with(_LATENTS, Tensor.detach, denoiser, args, kwargs)


def _with(
    chosen: Collection[str],
    change: Callable[[Tensor], Tensor],
    denoiser: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call, with the tensors in those of some names changed."""

    def changed(name: str, value: Any) -> Any:
        return tree_map_only(Tensor, change, value) if name in chosen else value

    # Each stays where it is, since decorators of `forward` read arguments by name.
    positional = (changed(name, value) for name, value in zip(_positional(denoiser, args), args, strict=True))
    return (*positional,), {name: changed(name, value) for name, value in kwargs.items()}


def _positional(denoiser: nn.Module, args: tuple) -> list[str]:
    """Names of the arguments that are given by position."""
    return [*inspect.signature(type(denoiser).forward).parameters][1 : len(args) + 1]

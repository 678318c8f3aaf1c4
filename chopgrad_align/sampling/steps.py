"""Sampling policies: which denoising steps a rollout backpropagates through.

The sampler is an iterated map: a prediction of the denoiser, then an update that is linear in latents and prediction
(with memory, in a multistep solver),

    y_t = D(x_t),    x_{t+1} = S_t(x_t, y_t, …),    t = 0 … N-1.

A policy answers, before the first step, with a `StepPlan`: the set C of steps that carry gradient. In the steps of C,
y_t is differentiated with respect to the weights and, unless `detach_input`, to x_t. In all others y_t is a constant:
the gradient of later latents still passes through S_t, but not through D. What comes before the first step of C has no
graph at all. Each chosen step costs one more forward and one backward pass of the denoiser, and the activations of one
call of it are alive at a time, so that more steps cost time and hardly memory.

Some pipelines sample in *sections* s = 0 … S-1, each such a loop: windows of a long video that see the one before,
resolutions of a pyramid, iterations of FreeInit. A policy is asked for each of them, with the same seed, and its steps
are counted anew: the last K are those of each section. What a later section is given of an earlier one, as latents, is
differentiated like any other input of D; so a gradient reaches back through the chosen steps of all sections, and
memory still grows by the inputs of the chosen calls alone. Constants are what sections hand on through an encoder of
pixels, or through a cache of keys and values. `sections=[0]` chooses sections; in all others every y_t is a constant.

A policy of your own is any object with a method `plan(num_steps, seed)` that returns a `StepPlan`.

Every policy of this module takes
    unconditional: False takes the unconditional prediction of classifier-free guidance for a constant, so that the
        gradient reaches the weights by the conditional one alone. Where the two are separate calls (Wan,
        HunyuanVideo), this halves the backward pass; where they are one call of a double batch (CogVideoX, LTX), it
        changes the gradient and not the cost.
and all but `LowVariance`
    sections: The sections that carry gradient, from 0; None for all.
    detach_input: DRTune (arXiv 2405.00760): the denoiser's input is a constant in every step, and the gradient passes
        from step to step through S_t only. Chained Jacobians of the denoiser, which amplify the gradient of early
        steps, disappear.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..common.arguments import whole_number
from ..common.errors import UsageError


@dataclass(frozen=True)
class StepPlan:
    """The steps of one section of a rollout that carry gradient; most rollouts have a single one.

    Args:
        steps: Their indices, from 0 to N - 1; at least one. Kept as a set.
        detach_input: Take the denoiser's input for a constant in each of them.
        unconditional: Also differentiate the unconditional prediction of classifier-free guidance.
        repeats: Additional clips from the last step, made of the clean latents with fresh noise; see `LowVariance`.
        surplus: Steps that were asked for beyond those that there are. A rollout does without them; where the number of
            steps is known beforehand (`check_call`), they are an error.
        sections: The sections that the plan is for, from 0; None for all. Kept as a set.
    """

    steps: Collection[int]
    detach_input: bool = False
    unconditional: bool = True
    repeats: int = 0
    surplus: int = 0
    sections: Collection[int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", frozenset(self.steps))
        if self.sections is not None:
            object.__setattr__(self, "sections", frozenset(self.sections))


class StepPolicy(Protocol):
    """The choice of steps that carry gradient: a small frozen object that is passed to `rollout`."""

    def plan(self, num_steps: int, seed: int) -> StepPlan:
        """Plan one section of a rollout.

        Args:
            num_steps: N, the steps of the section, 1 or more. A second-order scheduler (Heun) calls the denoiser twice
                in a step.
            seed: Decides everything that is drawn; the same seed gives the same plan.

        Raises:
            UsageError: The policy cannot be had with so many steps.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class _Through:
    """Paths that the gradient takes inside the chosen steps."""

    detach_input: bool = False
    unconditional: bool = True
    sections: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.sections is not None:
            name = f"{type(self).__name__}: sections"
            object.__setattr__(self, "sections", _different_numbers(name, self.sections, "[0] for the first"))
            for section in self.sections:
                whole_number(name, section, 0)

    def _plan(self, steps: Collection[int], surplus: int = 0) -> StepPlan:
        return StepPlan(steps, self.detach_input, self.unconditional, surplus=surplus, sections=self.sections)


@dataclass(frozen=True)
class LastSteps(_Through):
    """Gradient through the last K denoising steps; the latents that enter the first of them are a constant.

    DRaFT-K (arXiv 2309.17400) and VADER (arXiv 2407.08737). More steps give gradient to layout and motion, which the
    early ones decide, but chained steps also amplify it: clip its norm. A count of N or more means every step.

    Args:
        count: K, 1 or more.
    """

    count: int

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("LastSteps: count", self.count)

    def first(self, num_steps: int) -> int:
        """Index of the first of `num_steps` steps that carries gradient; all later ones do as well."""
        return max(0, num_steps - self.count)

    def plan(self, num_steps: int, seed: int) -> StepPlan:
        """See `StepPolicy.plan`."""
        return self._plan(range(self.first(num_steps), num_steps), max(0, self.count - num_steps))


@dataclass(frozen=True)
class RandomLast(_Through):
    """Gradient through the last k denoising steps, with k drawn uniformly from 1 … K in each rollout.

    The randomised truncation of AlignProp (arXiv 2310.03739): early steps get their gradient now and then, and a
    rollout costs (K + 1) / 2 steps in the mean.

    Args:
        count: K, 1 or more; N or more means up to every step.
    """

    count: int

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("RandomLast: count", self.count)

    def plan(self, num_steps: int, seed: int) -> StepPlan:
        """See `StepPolicy.plan`."""
        drawn = 1 + int(torch.randint(min(self.count, num_steps), (), generator=_generator(seed)))
        return self._plan(range(num_steps - drawn, num_steps), max(0, self.count - num_steps))


@dataclass(frozen=True)
class RandomSteps(_Through):
    """Gradient through a number of different steps, drawn uniformly from all of them in each rollout.

    With `detach_input=True` the estimator of DRTune (arXiv 2405.00760), but for its stratified draw.

    Args:
        count: How many, 1 or more; N or more means every step.
    """

    count: int

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("RandomSteps: count", self.count)

    def plan(self, num_steps: int, seed: int) -> StepPlan:
        """See `StepPolicy.plan`."""
        drawn = torch.randperm(num_steps, generator=_generator(seed))[: self.count]
        return self._plan(drawn.tolist(), max(0, self.count - num_steps))


@dataclass(frozen=True)
class Steps(_Through):
    """Gradient through the steps that are named.

    Args:
        indices: Different steps, from 0, which is the noisiest; negative ones count from the end, as in a list.
    """

    indices: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        named = _different_numbers("Steps: indices", self.indices, "[0, -1] for the first and the last step")
        object.__setattr__(self, "indices", named)

    def plan(self, num_steps: int, seed: int) -> StepPlan:
        """See `StepPolicy.plan`."""
        if outside := [index for index in self.indices if not -num_steps <= index < num_steps]:
            raise UsageError(
                f"Steps({[*self.indices]}): the sampler takes {num_steps} steps, so that there is no step "
                f"{outside[0]}: name some of {-num_steps} to {num_steps - 1}"
            )
        steps = {index % num_steps for index in self.indices}
        if len(steps) < len(self.indices):
            raise UsageError(f"Steps({[*self.indices]}): of {num_steps} steps two of these are the same one")
        return self._plan(steps)


@dataclass(frozen=True)
class LowVariance:
    """Gradient through the last step, for several clips: DRaFT-LV (arXiv 2309.17400).

    After the rollout its clean latents are noised anew to the level of the last step, with independent noise, and the
    last step is repeated on each. The mean gradient of these clips has less variance than that of one, for the price
    of single steps instead of whole samplings.

    Args:
        count: Repetitions, 1 or more; a rollout then gives `count + 1` clips for each prompt.
        unconditional: See above.
    """

    count: int
    unconditional: bool = True

    def __post_init__(self) -> None:
        whole_number("LowVariance: count", self.count)

    def plan(self, num_steps: int, seed: int) -> StepPlan:
        """See `StepPolicy.plan`.

        Raises:
            UsageError: There is only one step: its repetition on fresh noise would be a sampling with another seed.
        """
        if num_steps < 2:
            raise UsageError(
                f"LowVariance({self.count}) repeats the last of several steps, but the sampler takes one, which "
                "starts from pure noise: use LastSteps(1) and more seeds"
            )
        return StepPlan([num_steps - 1], unconditional=self.unconditional, repeats=self.count)


def expect_step_policy(steps: Any) -> None:
    """Raise a UsageError for what is not a policy, such as a number or the class of one."""
    if inspect.isclass(steps) or not callable(getattr(steps, "plan", None)):
        raise UsageError(f"rollout: steps={steps!r}: expected a policy, such as LastSteps(1)")


def plan_of(policy: StepPolicy, num_steps: int, seed: int) -> StepPlan:
    """Ask a policy for its plan, and check it.

    Raises:
        UsageError: As `StepPolicy.plan`; or a plan without steps, or with some that the sampler does not take.
    """
    plan = policy.plan(num_steps, seed)
    if not plan.steps or not set(plan.steps) <= set(range(num_steps)):
        raise UsageError(
            f"rollout: {policy!r} planned the steps {sorted(plan.steps)}: expected at least one, and each from 0 to "
            f"{num_steps - 1}"
        )
    return plan


def _different_numbers(argument: str, values: Any, example: str) -> tuple[int, ...]:
    """The values as a tuple: hashable, and not the caller's list."""
    try:
        named = tuple(values)
    except TypeError:
        named = ()
    if not named or any(type(value) is not int for value in named) or len(set(named)) < len(named):
        raise UsageError(f"{argument}={values!r}: expected a list of different whole numbers, such as {example}")
    return named


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

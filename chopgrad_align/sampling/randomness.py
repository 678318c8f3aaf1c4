"""Everything that a pipeline's call draws, as a function of its generators.

Pipelines of diffusers draw the first noise from the generators of their call, one for each video. But many of them do
not hand these to their scheduler, so that a stochastic one draws from the global random state, as does whatever else
takes no generator: noise on a condition, noise that a decoder injects, dropout.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .method_replacement import replaced

Generators = torch.Generator | list[torch.Generator] | None
"""As a pipeline's call takes them: one for each video in a list, one for all, or none."""


@contextmanager
def seeded(pipe: Any, generator: Generators, seed: int) -> Iterator[None]:
    """Within the context, all that calls of the pipeline draw is a function of the generators and the seed.

    Args:
        pipe: A diffusers pipeline.
        generator: As the calls get it; the scheduler's noise for a video is drawn from that video's generator.
        seed: See `seeded_state`.
    """
    step = functools.partial(step_drawing_from, generator)
    with seeded_state(seed, pipe.device), replaced(pipe.scheduler, "step", step):
        yield


@contextmanager
def seeded_state(seed: int, device: torch.device) -> Iterator[None]:
    """Within the context the global random state, that of the device too, follows from a seed; then it is as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def step_drawing_from(
    generator: Generators, original: Callable[..., Any], scheduler: Any, /, *args: Any, **kwargs: Any
) -> Any:
    """Take the place of `scheduler.step`, and let it draw from generators unless its caller names some."""
    given = inspect.signature(type(scheduler).step).bind(scheduler, *args, **kwargs)
    generator = given.arguments.get("generator") or generator
    if generator is None:
        return original(scheduler, *args, **kwargs)
    if "generator" in given.signature.parameters:
        given.arguments["generator"] = _one_a_row(generator, given.arguments["sample"])
    # The SDE solver of DPM draws the seeds of its Brownian motions instead, when it takes its first step.
    brownian = getattr(scheduler, "noise_sampler_seed", 0) is None
    seeds = [one.initial_seed() for one in listed(generator)]
    with mock.patch.object(scheduler, "noise_sampler_seed", seeds) if brownian else nullcontext():
        return original(*given.args, **given.kwargs)


def _one_a_row(generator: Generators, sample: Tensor) -> Generators:
    """Generators for the rows of a sample, of which a video has several where frames are rows."""
    if not isinstance(generator, list) or len(sample) % len(generator):
        return generator
    return [one for one in generator for _ in range(len(sample) // len(generator))]


def listed(generator: Generators) -> list[torch.Generator]:
    """The generators, however many a call got."""
    return generator if isinstance(generator, list) else [] if generator is None else [generator]


def states(generator: Generators) -> list[Tensor]:
    """Their random states, for `restore`."""
    return [one.get_state() for one in listed(generator)]


def restore(generator: Generators, states: list[Tensor]) -> None:
    """Set the generators to states of theirs, so that they draw the same again."""
    for one, state in zip(listed(generator), states, strict=True):
        one.set_state(state)

"""Trial of a scheduler on a model whose answer is known.

Let all data be one point c. A model that has learned them perfectly returns, for a mixture x = a c + s n of its
probability path, exactly the output that belongs to c and n = (x - a c) / s. Then a sampler that takes the outputs for
what they are ends in c, whatever its order, its number of steps and the noise that it adds, and on the way there n has
unit variance. One that takes velocities for noise, believes in another noise schedule, or asks for times in another
unit leaves the path or ends elsewhere.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .predictions.probability_paths import ProbabilityPath

_TOLERANCE = 0.05  # in standard deviations of the data, beside the noise at time 0, where some schedulers end
_NOISE_TOLERANCE = 1.25  # factor of its deviation; in 1024 numbers it is 1.02
_LEAST_TIME = 1e-4  # schedulers round times, down to 0, after which small ones tell little of the noise
_TELLING_TIME = 0.02


@dataclass(frozen=True)
class SchedulerUse:
    """How a pipeline's own code uses its scheduler.

    Attributes:
        scales_input: It calls `scale_model_input`.
        scales_noise: It multiplies the initial noise by `init_noise_sigma`.
        brings_sigmas: It makes the sigmas itself.
        brings_shift: It computes the shift `mu` for the size of the video.
        knows: Names in its code, among them those of scheduler classes that it treats apart.
    """

    scales_input: bool
    scales_noise: bool
    brings_sigmas: bool
    brings_shift: bool
    knows: frozenset[str]

    @classmethod
    def of(cls, pipe: Any) -> SchedulerUse:
        """Read it from the source of the pipeline's class."""
        call, latents = (_source(pipe, name) for name in ("__call__", "prepare_latents"))
        attributes = {node.attr for node in [*call, *latents] if isinstance(node, ast.Attribute)}
        assigned = {node.id for node in call if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        passed = {keyword.arg for node in call if isinstance(node, ast.Call) for keyword in node.keywords}
        return cls(
            "scale_model_input" in attributes,
            "init_noise_sigma" in attributes,
            "sigmas" in assigned,
            "mu" in passed,
            frozenset(node.id for node in call if isinstance(node, ast.Name)),
        )


def _source(pipe: Any, method: str) -> list[ast.AST]:
    found = inspect.unwrap(getattr(type(pipe), method, lambda: None))
    try:
        return [*ast.walk(ast.parse(textwrap.dedent(inspect.getsource(found))))]
    except (OSError, SyntaxError):  # made in an interpreter
        return []


class CannotSample(Exception):
    """A scheduler that does not sample a model; the text says why."""

    @classmethod
    def by(cls, error: Exception) -> CannotSample:
        """A scheduler that raised an error."""
        reason = " ".join(str(error).split())[:300].rstrip(".")
        return cls(f"{type(error).__name__}: {reason}" if reason else type(error).__name__)


def try_scheduler(scheduler: Any, path: ProbabilityPath, use: SchedulerUse, steps: int, bounded: bool = False) -> float:
    """Sample a perfect model by a copy of a scheduler, as a pipeline would.

    Args:
        scheduler: Any of diffusers.
        path: Of the model.
        use: Of the pipeline.
        steps: `num_inference_steps`.
        bounded: The data are in [-1, 1], as those of a scheduler that clips; else they are standard normal.

    Returns:
        The time of the first step, in (0, 1].

    Raises:
        CannotSample: It raises an error, asks for a time that the model does not have, leaves the path, or does not end
            in the data.
    """
    try:
        with quiet():
            return _sample(copy.deepcopy(scheduler), path, use, steps, bounded)
    except CannotSample:
        raise
    except Exception as error:  # each scheduler has its own ways to refuse
        raise CannotSample.by(error) from error


def _sample(scheduler: Any, path: ProbabilityPath, use: SchedulerUse, steps: int, bounded: bool) -> float:
    _set_timesteps(scheduler, use, steps)
    torch.default_generator.manual_seed(0)
    clean, latents = torch.randn(2, 1, 4, 4, 8, 8)
    clean = clean.clamp(-1, 1) if bounded else clean
    if use.scales_noise:
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    scaled = getattr(scheduler, "scale_model_input", None) if use.scales_input else None
    apart = type(scheduler).__name__ in use.knows and "old_pred_original_sample" in _parameters(scheduler.step)
    old, times, first = None, scheduler.timesteps, 1.0
    for i, timestep in enumerate(times):
        if not 0 <= (time := path.time(float(timestep))) <= 1:
            raise CannotSample(f"it asks for the time {float(timestep):.4g}, which the model does not have")
        noised = latents if scaled is None else scaled(latents, timestep)
        noise = _noise(path, clean, noised, max(time, _LEAST_TIME))
        deviation = noise.square().mean().sqrt().item()
        first = deviation if i == 0 else first
        low, high = min(1.0, first) / _NOISE_TOLERANCE, max(1.0, first) * _NOISE_TOLERANCE
        if time > _TELLING_TIME and not low < deviation < high:
            raise CannotSample(
                f"at the time {float(timestep):.4g} the latents would hold {deviation:.2g} times the noise that the "
                "model expects there"
            )
        output = path.output(clean, noise, max(time, _LEAST_TIME))
        if apart:
            back = times[i - 1] if i else None
            latents, old = scheduler.step(output, old, timestep, back, latents, return_dict=False)
        else:
            latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    error, left = (latents - clean).square().mean().sqrt(), path.noised(torch.zeros(()), torch.ones(()), 0.0)
    if not error <= _TOLERANCE + left:
        raise CannotSample(
            f"even a perfect model would be sampled with an error of {error:.2g} standard deviations of the data"
        )
    return path.time(float(times[0]))


def _set_timesteps(scheduler: Any, use: SchedulerUse, steps: int) -> None:
    shift = {"mu": 1.0} if use.brings_shift else {}
    if not use.brings_sigmas:
        scheduler.set_timesteps(steps, **shift)
    elif "sigmas" in _parameters(scheduler.set_timesteps):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), **shift)
    else:
        raise CannotSample("the pipeline brings sigmas of its own, and it takes none")


def _noise(path: ProbabilityPath, clean: Tensor, noised: Tensor, time: float) -> Tensor:
    """The noise of a mixture whose clean latents are known."""
    nothing = torch.zeros_like(clean)
    return (noised - path.noised(clean, nothing, time)) / path.noised(nothing, nothing + 1, time)


def _parameters(method: Any) -> set[str]:
    return {*inspect.signature(method).parameters}


@contextmanager
def quiet() -> Iterator[None]:
    """Within the context nothing is warned of, and the global random state is as before on exit."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng([]), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)

"""One call of the denoiser by the pipeline's own code: a scheduler of a single step, to the clean latents."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...common.errors import UsageError
from ...objective.terms import Reference
from .latents import continued, frame_axis
from .protocol import Videos


class Path(Protocol):
    """How a model's training mixes data and noise over time in [0, 1], and what it predicts."""

    def noised(self, clean: Tensor, noise: Tensor, time: float) -> Tensor:
        """The mixture."""
        ...

    def clean(self, output: Tensor, noised: Tensor, time: float) -> Tensor:
        """Clean latents from what the model returned for a mixture."""
        ...

    def output(self, clean: Tensor, noise: Tensor, time: float) -> Tensor:
        """What the model should return."""
        ...

    def timestep(self, time: float) -> float | int:
        """As the model is told it."""
        ...


@dataclass(frozen=True)
class Straight:
    """Flow matching on straight lines (Lipman and others, arXiv 2210.02747): the model returns noise - data."""

    scale: float
    """Of timesteps."""

    def noised(self, clean: Tensor, noise: Tensor, time: float) -> Tensor:
        return (1 - time) * clean + time * noise

    def clean(self, output: Tensor, noised: Tensor, time: float) -> Tensor:
        return noised - time * output

    def output(self, clean: Tensor, noise: Tensor, time: float) -> Tensor:
        return noise - clean

    def timestep(self, time: float) -> float:
        return time * self.scale


@dataclass(frozen=True)
class VariancePreserving:
    """Diffusion in discrete steps (Ho and others, arXiv 2006.11239), whose model returns one of three things.

    The noise; `v = a noise - s data` for the mixture `a data + s noise` (Salimans and Ho, arXiv 2202.00512); or the
    data.
    """

    cumulative: Tensor
    """Share of the data's variance in the mixture after each step, `a²`."""
    prediction: str

    def timestep(self, time: float) -> int:
        return round(time * (len(self.cumulative) - 1))

    def _parts(self, time: float) -> tuple[float, float]:
        share = self.cumulative[self.timestep(time)].item()
        return share**0.5, (1 - share) ** 0.5

    def noised(self, clean: Tensor, noise: Tensor, time: float) -> Tensor:
        a, s = self._parts(time)
        return a * clean + s * noise

    def clean(self, output: Tensor, noised: Tensor, time: float) -> Tensor:
        a, s = self._parts(time)
        match self.prediction:
            case "epsilon":
                return (noised - s * output) / a
            case "v_prediction":
                return a * noised - s * output
        return output

    def output(self, clean: Tensor, noise: Tensor, time: float) -> Tensor:
        a, s = self._parts(time)
        match self.prediction:
            case "epsilon":
                return noise
            case "v_prediction":
                return a * noise - s * clean
        return clean


def path_of(scheduler: Any) -> Path:
    """The path by which the model of a scheduler was trained.

    Raises:
        UsageError: It is neither of flow matching nor of variance-preserving diffusion.
    """
    config = scheduler.config
    prediction = config.get("prediction_type")
    if prediction == "flow_prediction" or type(scheduler).__name__.startswith("FlowMatch"):
        return Straight(float(config.num_train_timesteps))
    if prediction in ("epsilon", "v_prediction", "sample") and config.get("beta_schedule") is not None:
        return VariancePreserving(scheduler.alphas_cumprod.double().cpu(), prediction)
    raise UsageError(
        f"prediction: {type(scheduler).__name__} is not known to take one step; set model.scheduler.name to one of "
        "flow matching or of variance-preserving diffusion, or use prediction.mode=sample"
    )


class _Call:
    """What was seen of the one step."""

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
    """Made once, and not with each call: a class is freed late, and so would be the tensors that its methods know."""
    from diffusers import SchedulerMixin

    class OneStepScheduler(SchedulerMixin):
        """The part of a scheduler that pipelines use."""

        order, init_noise_sigma = 1, 1.0

        def __init__(self, config: Any, path: Path, time: float, known: Tensor | None, axis: int, call: _Call) -> None:
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
def one_call(pipe: Any, path: Path, time: float, known: Tensor | None = None) -> Iterator[_Call]:
    """Within the context the pipeline's sampler takes one step, from `time` to the clean latents.

    Args:
        pipe: Of diffusers.
        path: Of its model.
        time: In (0, 1].
        known: The first clean latents, in the pipeline's layout; they take the place of the predicted ones.
    """
    before, call = pipe.scheduler, _Call()
    pipe.scheduler = _scheduler()(before.config, path, time, known, frame_axis(pipe), call)
    try:
        yield call
    finally:
        pipe.scheduler = before

"""Probability paths between data and noise: how a diffusion model was trained, by its scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ...common.errors import UsageError


class ProbabilityPath(Protocol):
    """Mixture of data and noise over time in [0, 1], and what a model predicts for it."""

    def noised(self, clean: Tensor, noise: Tensor, time: float) -> Tensor:
        """The mixture at a time."""
        ...

    def clean(self, output: Tensor, noised: Tensor, time: float) -> Tensor:
        """Clean latents from the model's output for a mixture."""
        ...

    def output(self, clean: Tensor, noise: Tensor, time: float) -> Tensor:
        """The output that the model is trained to give."""
        ...

    def timestep(self, time: float) -> float | int:
        """The time in the unit that the model takes."""
        ...


@dataclass(frozen=True)
class RectifiedFlow:
    """Flow matching on straight lines (Lipman and others, arXiv 2210.02747): the model returns noise - data."""

    scale: float
    """Timestep of pure noise."""

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


def path_of(scheduler: Any) -> ProbabilityPath:
    """The path by which the model of a scheduler was trained.

    Raises:
        UsageError: It is neither of flow matching nor of variance-preserving diffusion.
    """
    config = scheduler.config
    prediction = config.get("prediction_type")
    if prediction == "flow_prediction" or type(scheduler).__name__.startswith("FlowMatch"):
        return RectifiedFlow(float(config.num_train_timesteps))
    if prediction in ("epsilon", "v_prediction", "sample") and config.get("beta_schedule") is not None:
        return VariancePreserving(scheduler.alphas_cumprod.double().cpu(), prediction)
    raise UsageError(
        f"prediction: {type(scheduler).__name__} is not known to take one step; set model.scheduler.name to one of "
        "flow matching or of variance-preserving diffusion, or use prediction.mode=sample"
    )

"""Probability paths between data and noise: how a diffusion model was trained, by its scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...common.errors import UsageError

_LEAST_SHARE = 2**-24  # without any data in the noisiest mixture, its ratio of noise to data is infinite


class ProbabilityPath(Protocol):
    """Mixture of data and noise over time in [0, 1], and what a model predicts for it."""

    @property
    def predicts(self) -> str:
        """The model's output, in words."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that tell a scheduler of diffusers of the path, whichever of them its class has."""
        ...

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

    def time(self, timestep: float) -> float:
        """The inverse of `timestep`."""
        ...


@dataclass(frozen=True)
class RectifiedFlow:
    """Flow matching on straight lines (Lipman and others, arXiv 2210.02747): the model returns noise - data."""

    scale: float
    """Timestep of pure noise."""

    @property
    def predicts(self) -> str:
        return "velocities of a flow"

    @property
    def settings(self) -> dict[str, Any]:
        return {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

    def noised(self, clean: Tensor, noise: Tensor, time: float) -> Tensor:
        return (1 - time) * clean + time * noise

    def clean(self, output: Tensor, noised: Tensor, time: float) -> Tensor:
        return noised - time * output

    def output(self, clean: Tensor, noise: Tensor, time: float) -> Tensor:
        return noise - clean

    def timestep(self, time: float) -> float:
        return time * self.scale

    def time(self, timestep: float) -> float:
        return timestep / self.scale


@dataclass(frozen=True)
class VariancePreserving:
    """Diffusion in discrete steps (Ho and others, arXiv 2006.11239), whose model returns one of three things.

    The noise; `v = a noise - s data` for the mixture `a data + s noise` (Salimans and Ho, arXiv 2202.00512); or the
    data.
    """

    cumulative: Tensor
    """Share of the data's variance in the mixture after each step, `a²`."""
    prediction: str

    @property
    def predicts(self) -> str:
        return {"epsilon": "noise", "v_prediction": "v, of data and noise", "sample": "data"}[self.prediction]

    @property
    def settings(self) -> dict[str, Any]:
        shares = self.cumulative.clamp(min=_LEAST_SHARE)
        betas = 1 - shares / torch.cat([torch.ones_like(shares[:1]), shares[:-1]])
        as_it_is = {"rescale_betas_zero_snr": False, "snr_shift_scale": 1.0}  # the betas tell it already
        return {"prediction_type": self.prediction, "trained_betas": betas.tolist(), **as_it_is}

    def timestep(self, time: float) -> int:
        return round(time * (len(self.cumulative) - 1))

    def time(self, timestep: float) -> float:
        return timestep / (len(self.cumulative) - 1)

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

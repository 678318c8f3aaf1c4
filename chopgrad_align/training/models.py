"""Load what a config names: the pipeline with its scheduler, and the objective."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from ..common.arguments import nearest
from ..common.errors import UsageError
from ..objective.losses import load_loss
from ..objective.objective import Objective
from ..objective.reward import load_reward
from ..objective.reward.loading import to_device
from ..objective.terms import LatentTerm, LossTerm, RewardTerm, Term
from ..sampling.predictions.latents import known_family
from ..sampling.predictions.probability_paths import path_of
from .config import Config, Loss, Model, Reward
from .lora import fuse_lora, lora_file

_LATENT: dict[str, Literal["latents", "outputs"]] = {"latent": "latents", "diffusion": "outputs"}


def check_pipeline(name: str, argument: str) -> None:
    """Raise a UsageError, which calls it `argument`, for a name that is neither a pipeline's folder nor a hub id."""
    folder = Path(name)
    if folder.exists():
        if not (folder / "model_index.json").is_file():
            raise UsageError(f"{argument}: {folder} holds no diffusers pipeline (no model_index.json)")
    else:
        _expect_hub_id(name, argument, "folder")


def read_pipeline(name: str, argument: str, dtypes: dict[str, str], variant: str | None = None) -> Any:
    """Load a diffusers pipeline from its folder or from the hub.

    Args:
        name: Folder or hub id.
        argument: What the user knows the name as; errors begin with it.
        dtypes: Of the weights: a type's name for each component that has its own, and `default`.
        variant: Of the weight files, such as fp16.

    Raises:
        UsageError: As `check_pipeline`, and if it cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    check_pipeline(name, argument)
    dtype = {component: getattr(torch, dtype) for component, dtype in dtypes.items()}
    try:
        return DiffusionPipeline.from_pretrained(name, dtype=dtype, variant=variant)
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{argument}: cannot load {name}; check the name and the network ({reason})") from error


def check_model(model: Model) -> None:
    check_pipeline(model.name, "model.name")
    for name, lora in model.loras.items():
        if Path(lora.name).exists():
            lora_file(Path(lora.name, lora.file or ""))
        else:
            _expect_hub_id(lora.name, f"model.loras.{name}.name", "folder or file")


def _expect_hub_id(name: str, argument: str, kind: str) -> None:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UsageError(f"{argument}: there is no {kind} {name}; give one, or a hub id such as owner/name")


def load_pipeline(model: Model) -> Any:
    """The pipeline on the CPU, its VAE in its own type, LoRAs fused, its scheduler replaced if the config says so."""
    pipe = read_pipeline(
        model.name, "model.name", {"default": model.dtype, "vae": model.vae_dtype}, variant=model.variant
    )
    for lora in model.loras.values():
        fuse_lora(pipe, lora.name, lora.file, lora.scale, lora.second)
    if model.scheduler:
        pipe.scheduler = _scheduler(pipe, dict(model.scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_prediction(pipe: Any, config: Config) -> None:
    """Raise a UsageError if the pipeline cannot predict as the config says."""
    if config.prediction.mode != "sample":
        path_of(pipe.scheduler)
        known_family(pipe)
    if type(pipe).__name__ == "WanVACEPipeline" and max(config.train.micro_batch, config.validation.batch) > 1:
        raise UsageError("WanVACEPipeline takes one clip a call: set train.micro_batch=1 and validation.batch=1")


def _scheduler(pipe: Any, settings: dict[str, Any]) -> Any:
    import diffusers

    name = settings.pop("name", type(pipe.scheduler).__name__)
    known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if name not in known:
        raise UsageError(f"model.scheduler.name: diffusers has no {name!r}{nearest(name, known)}")
    cls = getattr(diffusers, name)
    accepted = inspect.signature(cls.__init__).parameters
    for key in settings:
        if key not in accepted:
            raise UsageError(f"model.scheduler: {name} has no setting {key!r}{nearest(key, accepted)}")
    return cls.from_config(pipe.scheduler.config, **settings)


def load_objective(
    rewards: Mapping[str, Reward], device: torch.device, losses: Mapping[str, Loss] | None = None
) -> Objective:
    """The terms that a config names, with their networks on the device."""
    terms: dict[str, Term] = {}
    for key, reward in rewards.items():
        loaded = to_device(load_reward(reward.name, **reward.args), device)
        terms[key] = RewardTerm(loaded, reward.weight, reward.cap, reward.target, reward.normalize)
    for key, loss in (losses or {}).items():
        if loss.name in _LATENT:
            if loss.args:
                raise UsageError(f"losses.{key}.args: {loss.name!r} takes none")
            terms[key] = LatentTerm(_LATENT[loss.name], loss.weight)
        else:
            terms[key] = LossTerm(to_device(load_loss(loss.name, **loss.args), device), loss.weight)
    return Objective(terms)

"""Load what a config names: the pipeline with its scheduler, and the objective."""

from __future__ import annotations

import difflib
import inspect
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..objective import Objective, Term
from ..reward import load_reward
from .config import Model, Reward


def check_model(model: Model) -> None:
    """Raise a UsageError for a name that is neither a pipeline's folder nor a hub id."""
    folder = Path(model.name)
    if folder.exists():
        if not (folder / "model_index.json").is_file():
            raise UsageError(f"model.name: {folder} holds no diffusers pipeline (no model_index.json)")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model.name):
        raise UsageError(f"model.name: there is no folder {model.name}; give one, or a hub id such as owner/name")


def load_pipeline(model: Model, device: torch.device) -> Any:
    """The pipeline on the device, its VAE in its own type, its scheduler replaced if the config says so."""
    from diffusers import DiffusionPipeline

    check_model(model)
    dtype = {"default": getattr(torch, model.dtype), "vae": getattr(torch, model.vae_dtype)}
    try:
        pipe = DiffusionPipeline.from_pretrained(model.name, dtype=dtype, variant=model.variant)
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"model.name: cannot load {model.name}; check the name and the network ({reason})") from error
    if model.scheduler:
        pipe.scheduler = _scheduler(pipe, dict(model.scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _scheduler(pipe: Any, settings: dict[str, Any]) -> Any:
    import diffusers

    name = settings.pop("name", type(pipe.scheduler).__name__)
    known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, cutoff=0)[0]
        raise UsageError(f"model.scheduler.name: diffusers has no {name!r}; the nearest is {near!r}")
    cls = getattr(diffusers, name)
    accepted = inspect.signature(cls.__init__).parameters
    for key in settings:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, 1, cutoff=0)[0]
            raise UsageError(f"model.scheduler: {name} has no setting {key!r}; the nearest is {near!r}")
    return cls.from_config(pipe.scheduler.config, **settings)


def load_objective(rewards: dict[str, Reward], device: torch.device) -> Objective:
    terms = {}
    for key, reward in rewards.items():
        loaded: Any = load_reward(reward.name, **reward.args)
        if isinstance(loaded, torch.nn.Module):
            loaded = loaded.to(device)
        terms[key] = Term(loaded, reward.weight)
    return Objective(terms)

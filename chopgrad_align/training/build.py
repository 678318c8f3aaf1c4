"""The parts that a run computes with, made from its config; the same for the trainer and for the planner."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig

from ..common.arguments import shown
from ..common.errors import UsageError, located
from ..common.loading import construct, construct_known
from ..evaluation.witnesses import BUILT_IN, Bounds, Witness, load_witness
from ..objective.objective import Objective
from ..sampling.block_offload import offload_blocks
from ..sampling.call_shape import as_taken
from ..sampling.denoisers import denoisers_of
from ..sampling.rollout import check_call
from . import guard
from .average import Average
from .config import Config, Guard
from .data import clip_encoder
from .lora import freeze, lora_config, read_lora, with_what_fits
from .lora_files import lora_file, open_lora
from .methods import DirectGradient
from .models import check_prediction, load_objective, load_pipeline
from .optimizers import make_optimizer, make_schedule
from .sharding import shapes_of_the_whole
from .state import TrainState
from .trainable import LoraOnDenoisers, Trainable

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_TRAINABLES = {"modules": "chopgrad_align.training.modules:Modules"}


@dataclass(frozen=True)
class Models:
    """The networks of a run: the pipeline on the CPU with what is trained in it, and the objective on the device.

    Attributes:
        offloaded: Bytes of weights that stay in host memory.
    """

    pipe: Any
    objective: Objective
    trainable: Trainable
    offloaded: int = 0


def load_models(
    config: Config,
    device: torch.device,
    calls: Callable[[Any], Sequence[Mapping[str, Any]]],
    new_weights: AbstractContextManager[Any] | None = None,
    mesh: DeviceMesh | None = None,
) -> Models:
    """Load what a config names; what can be wrong is looked at first, the cheap things before the slow ones.

    Args:
        config: Of the run.
        device: Where rewards and losses go, and offloaded blocks run.
        calls: From the pipeline to the arguments of each kind of call that it will make.
        new_weights: Context in which the trained weights are made.
        mesh: Processes that share one copy of the frozen denoisers.

    Raises:
        UsageError: A model, scheduler, call, reward, loss or layer that is not there or does not fit.
    """
    if config.lora.start_from is not None:
        with located("lora.start_from"):
            open_lora(lora_file(Path(config.lora.start_from)))
    pipe = load_pipeline(config.model, mesh)
    check_prediction(pipe, config)
    _check_calls(pipe, config, calls(pipe))
    weight, fps = config.reference.weight, video_fps(config)
    objective = load_objective(config.rewards, device, config.losses, config.terms, weight, fps)
    torch.manual_seed(config.run.seed)  # the first weights
    with shapes_of_the_whole(pipe), nullcontext() if new_weights is None else new_weights:
        trainable = make_trainable(config, pipe)
        denoisers = denoisers_of(pipe).values() if config.model.offload else ()
        offloaded = sum(offload_blocks(denoiser, device) for denoiser in denoisers)
    return Models(pipe, objective, trainable, offloaded)


def video_fps(config: Config) -> float | None:
    """Frames a second of all videos of a run; None if files of clips have each their own."""
    clips = config.data.clips
    if clips is None:
        return config.model.fps
    return None if clips.fps is None else clips.fps / clips.stride


def make_trainable(config: Config, pipe: Any) -> Trainable:
    """Make what a config trains of a pipeline, which is frozen otherwise.

    Raises:
        UsageError: A class that cannot be loaded or is no `Trainable`, or layers that are not there.
    """
    named = config.trainable
    if named is None:
        made: Trainable = LoraOnDenoisers(pipe, _adapter(config), config.lora.denoisers)
    else:
        freeze(pipe)
        found = construct_known("trainable", named.name, _TRAINABLES, named.args, pipe=pipe)
        if not isinstance(found, Trainable):
            raise UsageError(f"trainable.name: {named.name} made a {type(found).__name__}, which is no Trainable")
        made = found
    with located("gradient.denoiser"):
        for denoiser in denoisers_of(pipe).values():
            config.checkpointing().expect_blocks(denoiser)
    return made


def _adapter(config: Config) -> LoraConfig:
    lora = config.lora
    return lora_config(lora.rank, lora.alpha, lora.targets, lora.dropout, lora.rslora, lora.dora, lora.init)


def _check_calls(pipe: Any, config: Config, calls: Sequence[Mapping[str, Any]]) -> None:
    steps = config.gradient.step_policy() if config.prediction.mode == "sample" else None
    for key, value in config.model.call.items():
        with located(f"model.call.{key}"):
            if key in ("latents", "num_videos_per_prompt") or key.endswith("_embeds"):
                raise UsageError("every video of a run is made of its own prompt and seed: leave it out")
            if key == "self" or key.startswith("callback"):
                raise UsageError("a config cannot give it: leave it out")
            if key == "negative_prompt" and not isinstance(value, str | None):
                raise UsageError(f"expected one text, for all videos, got {shown(value)}")
            if key.endswith("_kwargs") and not isinstance(value, dict | None):
                raise UsageError(f"expected values by name, got {shown(value)}")
    with located("model.call"):
        for call in calls:
            taken = as_taken(pipe, call) if config.data.clips else call
            check_call(pipe, {**taken, **config.prediction.columns}, steps, reserved=("generator", "prompt"))
        most = pipe.scheduler.config.get("num_train_timesteps", math.inf)
        if (config.model.call.get("num_inference_steps") or 0) > most:
            raise UsageError(f"num_inference_steps: expected at most {most}, the times that the scheduler has")


def make_method(
    config: Config, models: Models, phases: Callable[[str], AbstractContextManager[None]], **changes: Any
) -> DirectGradient:
    """The way to train that a config asks for.

    Args:
        config: Of the run.
        models: Of `load_models`.
        phases: Context of each named part of a step.
        changes: Attributes of the method that differ from the config's.
    """
    settings: dict[str, Any] = {
        "pipe": models.pipe,
        "call": as_taken(models.pipe, config.model.call) if config.data.clips else dict(config.model.call),
        "objective": models.objective,
        "steps": config.gradient.step_policy(),
        "backprop": config.gradient.policy(),
        "checkpointing": config.checkpointing(),
        "batch_size": config.train.batch_size,
        "phases": phases,
        "prediction": config.prediction.policy(clip_encoder(config), config.model.initial_noise()),
        "base": models.trainable.base,
    }
    return DirectGradient(**{**settings, **changes})


def make_witnesses(config: Config) -> dict[str, Witness]:
    """The witnesses that a config asks for, their networks on the CPU.

    Raises:
        UsageError: As `load_witness`.
    """
    own = {name: witness for name, witness in config.witnesses.items() if witness is not None}
    return {
        name: load_witness(name, own[name].name, own[name].args, video_fps(config)) if name in own else BUILT_IN[name]()
        for name in config.watched
    }


def make_guard(config: Guard, witnesses: Mapping[str, Witness]) -> guard.Guard:
    """The guard that a config asks for.

    Raises:
        UsageError: A guard of the user's own that is none.
    """
    if config.name is not None:
        made = construct("guard", config.name, config.name, dict(config.args))
        if not isinstance(made, guard.Guard):
            raise UsageError(f"guard.name: {config.name} made a {type(made).__name__}, expected a chopgrad_align.Guard")
        return made
    asked = {name: None if bound is None else Bounds.of(bound) for name, bound in config.bounds.items()}
    bounds = {name: witness.bounds for name, witness in witnesses.items()} | asked
    return guard.BoundsAndPatience(
        {name: bound for name, bound in bounds.items() if bound is not None}, config.patience, config.on_breach
    )


def make_state(config: Config, pipe: Any, trainable: Trainable) -> TrainState:
    """The state of a run before its first step.

    Raises:
        UsageError: `lora.start_from` does not fit; an optimizer or schedule that cannot be made.
    """
    if config.lora.start_from is not None:
        with located("lora.start_from"):
            found = read_lora(pipe, Path(config.lora.start_from), _adapter(config), config.lora.partial)
            own = trainable.state_dict()
            trainable.load_state_dict(with_what_fits(own, found) if config.lora.partial else found)
    optimizer, decay = make_optimizer(trainable.parameters, config.train), config.ema.decay
    average = None if decay is None else Average(trainable.parameters, decay)
    return TrainState(trainable, optimizer, make_schedule(optimizer, config.train), average)

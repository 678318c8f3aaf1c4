"""Load what a config names: the pipeline with its scheduler, and the objective."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from ..common.arguments import nearest, shown, usable_path
from ..common.errors import UsageError, located
from ..common.loading import construct
from ..objective.losses import load_loss
from ..objective.objective import Objective
from ..objective.reward import load_reward
from ..objective.reward.loading import to_device
from ..objective.terms import BaseDistanceTerm, LatentTerm, LossTerm, RewardTerm, Term
from ..sampling.predictions.latents import known_family
from ..sampling.predictions.probability_paths import path_of
from .config import Config, Loss, Model, Reward
from .config import Term as OwnTerm
from .lora import TRAINED, fuse_lora, lora_file
from .sharding import read_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_LATENT: dict[str, Literal["latents", "outputs"]] = {"latent": "latents", "diffusion": "outputs"}


def check_pipeline(name: str, argument: str) -> None:
    """Raise a UsageError, which calls it `argument`, for a name that is neither a pipeline's folder nor a hub id."""
    with located(argument):
        folder = Path(usable_path(name))
    if folder.exists():
        if not (folder / "model_index.json").is_file():
            raise UsageError(f"{argument}: {folder} holds no diffusers pipeline (no model_index.json)")
    else:
        _expect_hub_id(name, argument, "folder")


def read_pipeline(
    name: str, argument: str, dtypes: Mapping[str, str], variant: str | None = None, mesh: DeviceMesh | None = None
) -> Any:
    """Load a diffusers pipeline from its folder or from the hub.

    Args:
        name: Folder or hub id.
        argument: What the user knows the name as; errors begin with it.
        dtypes: Of the weights: a type's name for each component that has its own, and `default`.
        variant: Of the weight files, such as fp16.
        mesh: Processes among which the denoisers are sharded.

    Raises:
        UsageError: As `check_pipeline`, and if it cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    check_pipeline(name, argument)
    dtype = {component: getattr(torch, dtype) for component, dtype in dtypes.items()}
    try:
        if mesh is None:
            return DiffusionPipeline.from_pretrained(name, dtype=dtype, variant=variant)
        return _read_sharded_pipeline(name, dtype, variant, mesh)
    except Exception as error:  # of diffusers, transformers, safetensors and the hub, each of which has its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = "check its files" if Path(name).exists() else "check the name and the network"
        raise UsageError(f"{argument}: cannot load {name}; {remedy} ({reason})") from error


def _read_sharded_pipeline(name: str, dtypes: dict[str, torch.dtype], variant: str | None, mesh: DeviceMesh) -> Any:
    import diffusers
    from huggingface_hub import snapshot_download

    config = diffusers.DiffusionPipeline.load_config(name)
    classes = {key: config[key][1] for key in TRAINED if config.get(key, [None])[0] == "diffusers"}
    folder = name if Path(name).is_dir() else snapshot_download(name, allow_patterns=[f"{key}/*" for key in classes])
    denoisers = {
        key: read_sharded(
            getattr(diffusers, kind), Path(folder, key), dtypes.get(key, dtypes["default"]), mesh, variant
        )
        for key, kind in classes.items()
    }
    # Of its own class: DiffusionPipeline overlooks components that are given and may be absent, and loads them.
    pipeline = getattr(diffusers, config["_class_name"], diffusers.DiffusionPipeline)
    return pipeline.from_pretrained(name, dtype=dtypes, variant=variant, **denoisers)


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


def load_pipeline(model: Model, mesh: DeviceMesh | None = None) -> Any:
    """The pipeline on the CPU, its VAE in its own type, LoRAs fused, its scheduler replaced if the config says so.

    Its denoisers are sharded among the processes of a mesh, if there is one.
    """
    dtypes = {"default": model.dtype, "vae": model.vae_dtype}
    pipe = read_pipeline(model.name, "model.name", dtypes, model.variant, mesh)
    for lora in model.loras.values():
        fuse_lora(pipe, lora.name, lora.file, lora.scale, lora.second)
    if model.scheduler:
        pipe.scheduler = _scheduler(pipe, dict(model.scheduler), model.call.get("num_inference_steps"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_prediction(pipe: Any, config: Config) -> None:
    """Raise a UsageError if the pipeline cannot predict as the config says."""
    if config.prediction.mode != "sample":
        path_of(pipe.scheduler)
        known_family(pipe)
    if type(pipe).__name__ == "WanVACEPipeline" and max(config.train.micro_batch, config.validation.batch) > 1:
        raise UsageError("WanVACEPipeline takes one clip a call: set train.micro_batch=1 and validation.batch=1")


def _scheduler(pipe: Any, settings: dict[str, Any], steps: Any) -> Any:
    import diffusers

    name = settings.pop("name", type(pipe.scheduler).__name__)
    known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if name not in known:
        raise UsageError(f"model.scheduler.name: diffusers has no {name!r}{nearest(name, known)}")
    cls = getattr(diffusers, name)
    accepted = inspect.signature(cls).parameters
    for key, value in settings.items():
        if key not in accepted:
            raise UsageError(f"model.scheduler: {name} has no setting {key!r}{nearest(key, accepted)}")
        _check_setting(f"model.scheduler.{key}", value, accepted[key].annotation)
    try:
        scheduler = cls.from_config(pipe.scheduler.config, **settings)
        if not scheduler.config.get("use_dynamic_shifting"):  # or the pipeline tells the shift for its size
            _take_a_step(cls.from_config(scheduler.config), steps if type(steps) is int and 0 < steps <= 1000 else 10)
    except Exception as error:  # each scheduler has its own ways to refuse
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"model.scheduler: {name} refuses {settings} ({type(error).__name__}: {reason})") from error
    if _is_flow(pipe.scheduler) and not _is_flow(scheduler):
        raise UsageError(
            f"model.scheduler: the model predicts velocities of a flow, and {name} would take them for noise; add "
            "prediction_type=flow_prediction and use_flow_sigmas=true, or take a FlowMatch scheduler"
        )
    return scheduler


def _take_a_step(scheduler: Any, steps: int) -> None:
    """Let a scheduler make its times and use the first of them, as a pipeline would; raise whatever it raises."""
    scheduler.set_timesteps(steps)
    times, sample = torch.as_tensor(scheduler.timesteps), torch.zeros(1, 1, 1, 1, 1)
    highest = scheduler.config.num_train_timesteps if _is_flow(scheduler) else math.inf
    if not times.isfinite().all() or times.max() > highest or (_is_flow(scheduler) and times.min() < 0):
        raise ValueError(f"its times would be {times.tolist()[:3]}, …")
    if hasattr(scheduler, "scale_model_input"):
        sample = scheduler.scale_model_input(sample, times[0])
    scheduler.step(sample, times[0], sample)


def _is_flow(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch") or (
        scheduler.config.get("prediction_type") == "flow_prediction"
    )


def _check_setting(argument: str, value: Any, annotation: Any) -> None:
    """Raise a UsageError for another type than a signature declares, as far as it declares one."""
    allowed = set(get_args(annotation) or [annotation])
    if allowed <= {bool, int, float, str, type(None)} and not (
        type(value) in allowed or (float in allowed and type(value) is int)
    ):
        kinds = " or ".join(sorted(kind.__name__ for kind in allowed - {type(None)}))
        raise UsageError(f"{argument}: expected {kinds}, got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{argument}: expected a finite number, got {value}")
    if argument.endswith("shift") and isinstance(value, float | int) and not isinstance(value, bool) and value <= 0:
        raise UsageError(f"{argument}: expected a number above 0, got {value}")


def load_objective(
    rewards: Mapping[str, Reward],
    device: torch.device,
    losses: Mapping[str, Loss] | None = None,
    own: Mapping[str, OwnTerm] | None = None,
    reference: float = 0.0,
) -> Objective:
    """The terms that a config names, with their networks on the device; `reference` weighs the distance to the base.

    Raises:
        UsageError: One that cannot be loaded, or is none.
    """
    terms: dict[str, Term] = {}
    for key, reward in rewards.items():
        with located(f"rewards.{key}"):
            loaded = to_device(load_reward(reward.name, **reward.args), device)
        terms[key] = RewardTerm(loaded, reward.weight, reward.cap, reward.target, reward.normalize)
    for key, loss in (losses or {}).items():
        if loss.name in _LATENT:
            if loss.args:
                raise UsageError(f"losses.{key}.args: {loss.name!r} takes none")
            terms[key] = LatentTerm(_LATENT[loss.name], loss.weight)
        else:
            with located(f"losses.{key}"):
                terms[key] = LossTerm(to_device(load_loss(loss.name, **loss.args), device), loss.weight)
    for key, settings in (own or {}).items():
        term = construct("term", settings.name, settings.name, settings.args, weight=settings.weight)
        if not isinstance(term, Term):
            raise UsageError(
                f"terms.{key}.name: {settings.name} made a {type(term).__name__}, expected a chopgrad_align.Term"
            )
        if term.module is not None:
            to_device(term.module, device)
        terms[key] = term
    if reference:
        terms["reference"] = BaseDistanceTerm(reference)
    return Objective(terms)

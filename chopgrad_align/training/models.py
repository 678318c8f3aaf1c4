"""Load what a config names: the pipeline with its scheduler, and the objective."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..common.arguments import nearest, usable_path
from ..common.errors import UsageError, located
from ..common.loading import construct
from ..objective.losses import load_loss
from ..objective.objective import Objective
from ..objective.reward import load_reward
from ..objective.reward.loading import to_device
from ..objective.reward.protocol import at_fps
from ..objective.terms import BaseDistanceTerm, LatentTerm, LossTerm, RewardTerm, Term
from ..sampling.predictions.latents import known_family
from ..sampling.predictions.probability_paths import path_of
from .config import Config, Loss, Model, Reward
from .config import Term as OwnTerm
from .lora import TRAINED, fuse_lora
from .lora_files import lora_file, open_lora
from .quantization import check_quantization, kinds_by_component, read_quantized
from .schedulers import replaced_scheduler
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
    name: str,
    argument: str,
    dtypes: Mapping[str, str],
    variant: str | None = None,
    revision: str | None = None,
    pipeline: str | None = None,
    components: Mapping[str, str] | None = None,
    mesh: DeviceMesh | None = None,
    quantize: str | Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """Load a diffusers pipeline from its folder or from the hub.

    Args:
        name: Folder or hub id.
        argument: What the user knows the name as; errors begin with it.
        dtypes: Of the weights: a type's name for each component that has its own, and `default`.
        variant: Of the weight files, such as fp16.
        revision: Of the hub repository.
        pipeline: Class of diffusers; default: that which the repository names.
        components: Folder or hub id of models in the place of the pipeline's own, or beside them.
        mesh: Processes among which the denoisers are sharded.
        quantize: Kind of quantisation of the denoisers, or of each of some components.

    Raises:
        UsageError: As `check_pipeline`, a component to quantise that is not there, and if it cannot be loaded.
    """
    import diffusers
    from diffusers import AutoModel

    check_pipeline(name, argument)
    cls = pipeline_class(pipeline)
    dtype = {component: getattr(torch, dtype) for component, dtype in dtypes.items()}
    try:
        others: dict[str, Any] = {}
        chosen: dict[str, str] = {}
        if mesh is not None or quantize:
            config = cls.load_config(name, revision=revision)
            chosen = kinds_by_component(quantize, {key for key, part in config.items() if part != [None, None]})
            own = {"variant": variant, "revision": revision}
            for key, kind in chosen.items():
                found = (components or {}).get(key)
                library, model = config[key] if found is None else ("diffusers", "AutoModel")
                place = {"source": name, "subfolder": key, **own} if found is None else {"source": found}
                others[key] = read_quantized(kind, library, model, dtype=dtype.get(key, dtype["default"]), **place)
            if mesh is not None:
                others = _sharded_denoisers(name, config, dtype, variant, revision, mesh)
            # DiffusionPipeline itself overlooks components that are given and may be absent, and loads them.
            cls = getattr(diffusers, config["_class_name"], cls) if pipeline is None else cls
        others |= {
            key: AutoModel.from_pretrained(where, dtype=dtype.get(key, dtype["default"]))
            for key, where in (components or {}).items()
            if key not in chosen
        }
        return cls.from_pretrained(name, dtype=dtype, variant=variant, revision=revision, **others)
    except UsageError:
        raise
    except Exception as error:  # of diffusers, transformers, safetensors and the hub, each of which has its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = "check its files" if Path(name).exists() else "check the name and the network"
        raise UsageError(f"{argument}: cannot load {name}; {remedy} ({reason})") from error


def _sharded_denoisers(
    name: str,
    config: Mapping[str, Any],
    dtypes: Mapping[str, torch.dtype],
    variant: str | None,
    revision: str | None,
    mesh: DeviceMesh,
) -> dict[str, Any]:
    import diffusers
    from huggingface_hub import snapshot_download

    classes = {key: config[key][1] for key in TRAINED if config.get(key, [None])[0] == "diffusers"}
    if not Path(name).is_dir():
        name = snapshot_download(name, revision=revision, allow_patterns=[f"{key}/*" for key in classes])
    return {
        key: read_sharded(getattr(diffusers, kind), Path(name, key), dtypes.get(key, dtypes["default"]), mesh, variant)
        for key, kind in classes.items()
    }


def pipeline_class(name: str | None) -> Any:
    """The class of diffusers of this name; `None` is the one that finds out itself.

    Raises:
        UsageError: There is none.
    """
    import diffusers

    if name is None:
        return diffusers.DiffusionPipeline
    known = [n for n in dir(diffusers) if n.endswith("Pipeline")]
    if name not in known:
        raise UsageError(f"model.pipeline: diffusers has no {name!r}{nearest(name, known)}")
    return getattr(diffusers, name)


def check_model(model: Model) -> None:
    """Raise a UsageError for what of a model's settings can be seen to be wrong before anything is loaded."""
    check_pipeline(model.name, "model.name")
    pipeline_class(model.pipeline)
    check_quantization(model.quantize)
    for name, component in model.components.items():
        if not Path(component).exists():
            _expect_hub_id(component, f"model.components.{name}", "folder")
    for name, lora in model.loras.items():
        if Path(lora.name).exists():
            open_lora(lora_file(Path(lora.name, lora.file or "")))
        else:
            _expect_hub_id(lora.name, f"model.loras.{name}.name", "folder or file")


def _expect_hub_id(name: str, argument: str, kind: str) -> None:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UsageError(f"{argument}: there is no {kind} {name}; give one, or a hub id such as owner/name")


def load_pipeline(model: Model, mesh: DeviceMesh | None = None) -> Any:
    """The pipeline on the CPU, its VAE in its own type, LoRAs fused, its scheduler replaced if the config says so.

    Its denoisers are sharded among the processes of a mesh, if there is one.
    """
    pipe = read_pipeline(
        model.name,
        "model.name",
        {"default": model.dtype, "vae": model.vae_dtype},
        model.variant,
        model.revision,
        model.pipeline,
        model.components,
        mesh,
        model.quantize,
    )
    for name, lora in model.loras.items():
        with located(f"model.loras.{name}"):
            fuse_lora(pipe, lora.name, lora.file, lora.scale, lora.second, lora.partial)
    if model.scheduler:
        pipe.scheduler = replaced_scheduler(pipe, model.scheduler, model.call.get("num_inference_steps"))
    if type(getattr(pipe, "vae", None)).__name__ == "AutoencoderKLAllegro":  # which decodes in no other way
        pipe.vae.enable_tiling()
        pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_prediction(pipe: Any, config: Config) -> None:
    """Raise a UsageError if the pipeline cannot predict as the config says."""
    if config.prediction.mode != "sample":
        path_of(pipe.scheduler)
        known_family(pipe)
    if type(pipe).__name__ == "WanVACEPipeline" and max(config.train.micro_batch, config.validation.batch) > 1:
        raise UsageError("WanVACEPipeline takes one clip a call: set train.micro_batch=1 and validation.batch=1")


def load_objective(
    rewards: Mapping[str, Reward],
    device: torch.device,
    losses: Mapping[str, Loss] | None = None,
    own: Mapping[str, OwnTerm] | None = None,
    reference: float = 0.0,
    fps: float | None = None,
) -> Objective:
    """The terms that a config names, with their networks on the device.

    `reference` weighs the distance to the base; rewards that depend on the frames a second of videos are told `fps`.

    Raises:
        UsageError: One that cannot be loaded, or is none.
    """
    terms: dict[str, Term] = {}
    for key, reward in rewards.items():
        with located(f"rewards.{key}"):
            loaded = to_device(load_reward(reward.name, **reward.args), device)
            loaded = loaded if fps is None else at_fps(loaded, fps)
        terms[key] = RewardTerm(loaded, reward.weight, reward.cap, reward.target, reward.normalize, reward.reduction())
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

"""LoRA on the denoisers of a pipeline, by peft: add, collect, save in diffusers' format, load."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..common.errors import UsageError
from ..common.weight_files import difference
from .low_precision_lora import save_low_precision_inputs

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
_CONFIG = "lora_config"
_KEPT = ("r", "lora_alpha", "use_rslora", "use_dora")  # that decide what the weights mean
_DIFFUSERS_CONFIG = "lora_adapter_metadata"  # whose keys begin with the component
_SECOND = "transformer_2"
TRAINED = ("transformer", _SECOND, "unet")


def freeze(pipe: Any) -> None:
    """Take the gradient from all weights of a pipeline."""
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)


def add_lora(pipe: Any, config: LoraConfig) -> dict[str, Any]:
    """Freeze the pipeline, add a LoRA to its denoisers, and return these by component name.

    The LoRA's weights are float32 whatever the denoiser's type: updates of bfloat16 weights fall below their rounding
    step and training silently stops.
    """
    freeze(pipe)
    denoisers = {name: pipe.components[name] for name in TRAINED if pipe.components.get(name) is not None}
    if not denoisers:
        raise UsageError(f"{type(pipe).__name__} has no denoiser among {', '.join(TRAINED)}")
    if hasattr(pipe, "load_lora_weights") and (lost := set(denoisers).difference(pipe._lora_loadable_modules)):
        raise UsageError(f"{type(pipe).__name__}: diffusers could not load a LoRA of {', '.join(lost)} again")
    for name, denoiser in denoisers.items():
        _check_targets(name, denoiser, config)
        try:
            inject_adapter_in_model(config, denoiser, adapter_name="default")
        except (ValueError, TypeError) as error:  # of a module that no LoRA can be on, or of other values of the config
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"lora: peft refuses the targets or settings for {name} ({reason})") from error
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        _measure_magnitudes(denoiser)
        save_low_precision_inputs(denoiser)
    return denoisers


def _measure_magnitudes(denoiser: nn.Module) -> None:
    """Take the magnitudes of a DoRA again from float32 factors.

    peft rounds them to the denoiser's type, and the model would not start as the base model.
    """
    layers: list[Any] = [layer for layer in denoiser.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        for adapter, magnitude in layer.lora_magnitude_vector.items():
            factors = {"lora_A": layer.lora_A[adapter].weight, "lora_B": layer.lora_B[adapter].weight}
            magnitude.update_layer(base_layer=layer.get_base_layer(), scaling=layer.scaling[adapter], **factors)


def _check_targets(name: str, denoiser: nn.Module, config: LoraConfig) -> None:
    """Raise a UsageError for a target without a layer, since peft is content if one of several has one, or a rank that
    no layer can have."""
    linear = {path: module for path, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    targets = config.target_modules
    if isinstance(targets, str):
        patterns = {targets: targets}
    else:
        patterns = {target: rf"(.*\.)?{re.escape(target)}" for target in sorted(targets or ())}
    try:
        matched = {t: [path for path in linear if re.fullmatch(pattern, path)] for t, pattern in patterns.items()}
    except re.error as error:
        raise UsageError(f"lora.targets: {targets!r} is not a regular expression ({error})") from error
    if unmatched := [t for t, paths in matched.items() if not paths]:
        names = sorted({re.sub(r".*\.(?=\D)", "", path) for path in linear})
        raise UsageError(
            f"lora.targets: {', '.join(map(repr, unmatched))} matches no linear layer of {name} "
            f"({type(denoiser).__name__}); these are called {', '.join(names)}"
        )
    layers = [linear[path] for paths in matched.values() for path in paths]
    full = max((min(layer.in_features, layer.out_features) for layer in layers), default=0)
    if config.r > full:
        raise UsageError(f"lora.rank={config.r}: the targets in {name} have full rank at {full}; choose less")


def lora_parameters(denoisers: dict[str, nn.Module]) -> list[nn.Parameter]:
    return [p for denoiser in denoisers.values() for p in denoiser.parameters() if p.requires_grad]


def lora_state(denoisers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The LoRA's weights by diffusers' names, `component.layer.lora_A.weight`."""
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, denoiser in denoisers.items()
        for key, value in _lora_weights(denoiser).items()
    }


def _lora_weights(denoiser: nn.Module) -> dict[str, Tensor]:
    # Not from the denoiser's `state_dict`, for which processes that share its frozen weights would have to meet.
    found: dict[str, Tensor] = get_peft_model_state_dict(denoiser, dict(denoiser.named_parameters()))
    return found


def load_lora_state(denoisers: dict[str, nn.Module], state: Mapping[str, Tensor]) -> None:
    """Take over the weights that `lora_state` returned.

    Raises:
        UsageError: Others; peft would take what fits and leave the rest.
    """
    if found := difference(state, lora_state(denoisers)):
        raise UsageError(
            f"the LoRA has other weights than these layers: {found}; give one of the same model and layers"
        )
    with torch.no_grad():
        for name, denoiser in denoisers.items():
            for key, weight in _lora_weights(denoiser).items():
                weight.copy_(state[f"{name}.{key}"])


def save_lora(pipe: Any, denoisers: dict[str, nn.Module], config: LoraConfig, folder: Path) -> None:
    """Save so that `pipe.load_lora_weights(folder)` of plain diffusers gives the same model, alpha included.

    Of Wan 2.2's pair of transformers that call loads the LoRA of the first; the second one's is in `transformer_2/` and
    needs another call, with `load_into_transformer_2=True`. Stable Video Diffusion has no LoRA loader in diffusers.
    `load_lora` does either.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not hasattr(pipe, "save_lora_weights"):
        kept = {name: getattr(config, name) for name in (*_KEPT, "target_modules")}
        metadata = {"format": "pt", _CONFIG: json.dumps(kept, default=sorted)}  # peft holds targets in a set
        save_file(lora_state(denoisers), folder / WEIGHTS_NAME, metadata=metadata)
        return
    for name, denoiser in denoisers.items():
        of = "transformer" if name == _SECOND else name  # diffusers names both alike
        weights = {f"{of}_lora_layers": _lora_weights(denoiser)}
        # Without the dropout, which diffusers would load switched on.
        metadata = {f"{of}_lora_adapter_metadata": config.to_dict() | {"lora_dropout": 0.0}}
        where = folder / _SECOND if name == _SECOND else folder
        type(pipe).save_lora_weights(str(where), **weights, **metadata)


def lora_file(path: Path) -> Path:
    """The weights that a file's or a folder's path means; a UsageError if they are not there."""
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"there are no LoRA weights {file}; give the folder RUN/lora of a run, or a .safetensors file")
    return file


def read_lora(path: Path, config: LoraConfig) -> dict[str, Tensor]:
    """Read a saved LoRA as `lora_state` returns one, to go on from.

    Args:
        path: A file or the folder of one; that of `transformer_2` beside it is read too.
        config: Of the LoRA that takes it over.

    Raises:
        UsageError: The file is not there, or says that it was trained as another kind or with another scale.
    """
    file = lora_file(path)
    state = _read(file, config)
    if (second := file.parent / _SECOND / file.name).is_file():
        state |= {f"{_SECOND}.{key.partition('.')[2]}": value for key, value in _read(second, config).items()}
    return state


def _read(file: Path, config: LoraConfig) -> dict[str, Tensor]:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
        weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
    known = json.loads(metadata.get(_CONFIG) or metadata.get(_DIFFUSERS_CONFIG) or "{}")
    for key, saved in known.items():
        name = key.rpartition(".")[2]
        if name in _KEPT and saved != getattr(config, name):
            setting = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora", "use_dora": "dora"}[name]
            raise UsageError(f"lora.start_from: {file} was trained with lora.{setting}={saved}; set that")
    return weights


def load_lora(pipe: Any, path: Path, adapter: str | None = None, scale: float = 1.0) -> None:
    """Add a saved LoRA, a file or the folder of one, to a plain pipeline, also if diffusers has no loader for it.

    diffusers rounds its weights to the denoiser's type; in training they are float32.

    Args:
        pipe: Of diffusers.
        path: As `save_lora` wrote it, or one of another maker.
        adapter: A name for it, if there are to be several; a Python identifier.
        scale: Its weight; between 0 and 1 the model is between the base model and the tuned one, as in DRaFT (arXiv
            2309.17400).

    Raises:
        UsageError: The file is not there, or does not fit the pipeline.
    """
    from diffusers.utils.peft_utils import scale_lora_layers

    path = lora_file(path)
    with _fitting(pipe, path):
        if hasattr(pipe, "load_lora_weights"):
            _load(pipe, str(path.parent), path.name, adapter)
            if (path.parent / _SECOND / path.name).is_file():
                _load(pipe, str(path.parent / _SECOND), path.name, adapter, second=True)
        elif adapter is not None:
            raise ValueError("diffusers has no loader for LoRAs on this pipeline, so there can be one only")
        else:
            with safe_open(path, "pt") as file:
                config = LoraConfig(**json.loads(file.metadata()[_CONFIG]))
            load_lora_state(add_lora(pipe, config), load_file(path))
    for name in TRAINED:
        if pipe.components.get(name) is not None:
            scale_lora_layers(pipe.components[name], scale)


def fuse_lora(pipe: Any, name: str, file: str | None = None, scale: float = 1.0, second: bool = False) -> None:
    """Add a LoRA to the weights of a pipeline themselves.

    Args:
        pipe: Of diffusers.
        name: Folder, file or hub id.
        file: Of a folder, or of a hub repository, that holds several.
        scale: Its weight.
        second: Whether it is for `transformer_2`, of Wan 2.2's pair of transformers.

    Raises:
        UsageError: The LoRA cannot be loaded, or does not fit the pipeline.
    """
    with _fitting(pipe, name):
        if not hasattr(pipe, "load_lora_weights"):
            raise ValueError("diffusers has no loader for LoRAs on this pipeline")
        path = Path(name, file or "")
        if second and (path / _SECOND).is_dir():
            path = path / _SECOND  # a run's, which has those of both
        if not path.exists():
            _load(pipe, name, file, second=second)
        elif second:
            found = lora_file(path)
            _load(pipe, str(found.parent), found.name, second=True)
        else:
            load_lora(pipe, path)
        parts = [part for part in pipe._lora_loadable_modules if getattr(pipe, part, None) is not None]
        pipe.fuse_lora(components=parts, lora_scale=scale)
        pipe.unload_lora_weights()


def _load(pipe: Any, folder: str, file: str | None, adapter: str | None = None, second: bool = False) -> None:
    into = {"load_into_transformer_2": True} if second else {}  # of which other pipelines know nothing
    before = pipe.get_list_adapters()
    pipe.load_lora_weights(folder, weight_name=file, adapter_name=adapter, **into)
    if pipe.get_list_adapters() == before:  # diffusers logs that nothing fits, and goes on
        raise ValueError(f"it has no weights for {', '.join(pipe._lora_loadable_modules)}")


@contextmanager
def _fitting(pipe: Any, lora: object) -> Iterator[None]:
    """Within the context, what goes wrong with a LoRA is a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # of diffusers, peft, safetensors and the hub, each of which has its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(
            f"the LoRA {lora} cannot be loaded into {type(pipe).__name__}; give one of this model ({reason})"
        ) from error


def lora_config(
    rank: int,
    alpha: float | None,
    targets: list[str] | str,
    dropout: float,
    rslora: bool = False,
    dora: bool = False,
    init: Literal["gaussian", "kaiming"] = "gaussian",
) -> LoraConfig:
    """A LoRA whose factor B is zero: the model starts as the base model, exactly."""
    return LoraConfig(
        r=rank,
        lora_alpha=alpha or rank,
        target_modules=targets,
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        init_lora_weights="gaussian" if init == "gaussian" else True,
    )

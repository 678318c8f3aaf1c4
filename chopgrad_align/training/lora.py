"""LoRA on the denoisers of a pipeline, by peft: add, collect, save in diffusers' format, load."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from ..common.errors import UsageError
from ..common.weight_files import difference
from .lora_files import (
    DENOISERS,
    OWN_CONFIG,
    SECOND,
    WEIGHTS_NAME,
    FittedLora,
    download_lora,
    fit_lora,
    in_words,
    lora_file,
    open_lora,
)
from .low_precision_lora import save_low_precision_inputs

_KEPT = ("r", "lora_alpha", "use_rslora", "use_dora")  # that decide what the weights mean
TRAINED = DENOISERS


def freeze(pipe: Any) -> None:
    """Take the gradient from all weights of a pipeline."""
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)


def add_lora(pipe: Any, config: LoraConfig, only: Collection[str] | None = None) -> dict[str, Any]:
    """Freeze the pipeline, add a LoRA to its denoisers, and return these by component name.

    The LoRA's weights are float32 whatever the denoiser's type: updates of bfloat16 weights fall below their rounding
    step and training silently stops.

    Args:
        pipe: Of diffusers.
        config: Of the LoRA.
        only: Names of the denoisers to add it to; default: all.
    """
    freeze(pipe)
    denoisers = {name: pipe.components[name] for name in TRAINED if pipe.components.get(name) is not None}
    if not denoisers:
        raise UsageError(f"{type(pipe).__name__} has no denoiser among {', '.join(TRAINED)}")
    if absent := sorted(set(only or ()) - denoisers.keys()):
        raise UsageError(f"lora.denoisers: {type(pipe).__name__} has no {absent[0]}; it has {', '.join(denoisers)}")
    denoisers = {name: denoiser for name, denoiser in denoisers.items() if only is None or name in only}
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
    own = lora_state(denoisers)
    if difference(state, own):
        other = {
            key: f"{tuple(v.shape)} for {tuple(own[key].shape)}"
            for key, v in state.items()
            if key in own and v.shape != own[key].shape
        }
        other |= dict.fromkeys(own.keys() - state.keys(), "not in it") | dict.fromkeys(
            state.keys() - own.keys(), "not trained here"
        )
        raise UsageError(
            f"the LoRA has other weights than these layers: {in_words(dict(sorted(other.items())))}; "
            "give one of the same model, rank and layers, or allow a part of it by `partial`"
        )
    with torch.no_grad():
        for name, denoiser in denoisers.items():
            for key, weight in _lora_weights(denoiser).items():
                weight.copy_(state[f"{name}.{key}"])


def with_what_fits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA's own weights, with those of another in their place where it has the same layer and rank.

    Raises:
        UsageError: It has none.
    """
    fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    if not fitting:
        raise UsageError("the LoRA has nothing in common with the layers that are trained, or another rank")
    return {**own, **fitting}


def save_lora(pipe: Any, denoisers: dict[str, nn.Module], config: LoraConfig, folder: Path) -> None:
    """Save so that `pipe.load_lora_weights(folder)` of plain diffusers gives the same model, alpha included.

    Of Wan 2.2's pair of transformers that call loads the LoRA of the first; the second one's is in `transformer_2/` and
    needs another call, with `load_into_transformer_2=True`. Stable Video Diffusion has no LoRA loader in diffusers.
    `load_lora` does either.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not hasattr(pipe, "save_lora_weights"):
        kept = {name: getattr(config, name) for name in (*_KEPT, "target_modules")}
        metadata = {"format": "pt", OWN_CONFIG: json.dumps(kept, default=sorted)}  # peft holds targets in a set
        save_file(lora_state(denoisers), folder / WEIGHTS_NAME, metadata=metadata)
        return
    for name, denoiser in denoisers.items():
        of = "transformer" if name == SECOND else name  # diffusers names both alike
        weights = {f"{of}_lora_layers": _lora_weights(denoiser)}
        # Without the dropout, which diffusers would load switched on.
        metadata = {f"{of}_lora_adapter_metadata": config.to_dict() | {"lora_dropout": 0.0}}
        where = folder / SECOND if name == SECOND else folder
        type(pipe).save_lora_weights(str(where), **weights, **metadata)


def read_lora(pipe: Any, path: Path, config: LoraConfig, partial: bool = False) -> dict[str, Tensor]:
    """Read a saved LoRA as `lora_state` returns one, to go on from.

    Args:
        pipe: For whose denoisers it is; with or without a LoRA.
        path: A file or the folder of one; that of `transformer_2` beside it is read too.
        config: Of the LoRA that takes it over.
        partial: Whether to leave out what does not fit.

    Raises:
        UsageError: The file is not there, does not fit, or says that it was trained as another kind or with another
            scale.
    """
    file = lora_file(path)
    second = file.parent.name == SECOND
    weights = dict(_expect_kind(fit_lora(pipe, open_lora(file), partial, second), config, file))
    if (beside := file.parent / SECOND / file.name).is_file():
        weights |= _expect_kind(fit_lora(pipe, open_lora(beside), partial, second=True), config, beside)
    return {f"{name}.{key}": value for name, own in weights.items() for key, value in own.items()}


def _expect_kind(lora: FittedLora, config: LoraConfig, file: Path) -> Mapping[str, Mapping[str, Tensor]]:
    """The weights of a LoRA for one of a given kind; where the file has no settings, A takes over the scale."""
    for name in _KEPT:
        if name in lora.config and lora.config[name] != getattr(config, name):
            setting = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora", "use_dora": "dora"}[name]
            raise UsageError(f"lora.start_from: {file} was trained with lora.{setting}={lora.config[name]}; set that")
    if "lora_alpha" in lora.config:
        return lora.weights
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    return {
        name: {key: value / scale if "lora_A" in key and scale != 1 else value for key, value in own.items()}
        for name, own in lora.weights.items()
    }


def load_lora(pipe: Any, path: Path, adapter: str | None = None, scale: float = 1.0, partial: bool = False) -> None:
    """Add a saved LoRA, a file or the folder of one, to a plain pipeline, also if diffusers has no loader for it.

    Its weights are rounded to the denoiser's type, as diffusers does it; in training they are float32.

    Args:
        pipe: Of diffusers.
        path: As `save_lora` wrote it, or one of another maker, see `lora_files`.
        adapter: A name for it, if there are to be several; a Python identifier.
        scale: Its weight; between 0 and 1 the model is between the base model and the tuned one, as in DRaFT (arXiv
            2309.17400).
        partial: Whether to leave out what does not fit.

    Raises:
        UsageError: The file is not there, or does not fit the pipeline.
    """
    from diffusers.utils.peft_utils import scale_lora_layers

    for name in _attach(pipe, lora_file(path), adapter, partial):
        scale_lora_layers(pipe.components[name], scale)


def fuse_lora(
    pipe: Any, name: str, file: str | None = None, scale: float = 1.0, second: bool = False, partial: bool = False
) -> None:
    """Add a LoRA to the weights of a pipeline themselves.

    Args:
        pipe: Of diffusers.
        name: Folder, file or hub id.
        file: Of a folder, or of a hub repository, that holds several.
        scale: Its weight.
        second: Whether it is for `transformer_2`, of Wan 2.2's pair of transformers.
        partial: Whether to leave out what does not fit.

    Raises:
        UsageError: The LoRA cannot be loaded, or does not fit the pipeline.
    """
    from diffusers.loaders.peft import PeftAdapterMixin
    from diffusers.utils.peft_utils import recurse_remove_peft_layers, scale_lora_layers

    path = Path(name, file or "")
    if second and (path / SECOND).is_dir():
        path = path / SECOND  # a run's, which has those of both
    with _fitting(pipe, name):
        path = lora_file(path) if path.exists() else download_lora(name, file)
    for component in _attach(pipe, path, None, partial, second):
        module = pipe.components[component]
        scale_lora_layers(module, scale)
        for layer in module.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
        recurse_remove_peft_layers(module)
        del module.peft_config
        if isinstance(module, PeftAdapterMixin):
            module._hf_peft_config_loaded = False


def _attach(pipe: Any, path: Path, adapter: str | None, partial: bool, second: bool = False) -> list[str]:
    """Put a LoRA beside the weights of a pipeline, and return the names of the components that have it now."""
    second = second or path.parent.name == SECOND
    fitted = [fit_lora(pipe, open_lora(path), partial, second)]
    if not second and (beside := path.parent / SECOND / path.name).is_file():
        fitted.append(fit_lora(pipe, open_lora(beside), partial, second=True))
    attached = []
    for lora in fitted:
        for name, weights in lora.weights.items():
            with _fitting(pipe, path):
                _inject(pipe.components[name], dict(weights), lora.config, adapter)
            attached.append(name)
    return attached


def _inject(module: Any, weights: dict[str, Tensor], settings: Mapping[str, Any], adapter: str | None) -> None:
    """Give the layers that the weights are of a LoRA of peft, as diffusers' loaders do it."""
    from diffusers.loaders.peft import PeftAdapterMixin

    adapter = adapter or f"default_{len(getattr(module, 'peft_config', {}))}"
    ranks = {key.removesuffix(".lora_A.weight"): a.shape[0] for key, a in weights.items() if "lora_A" in key}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{layer}": r for layer, r in ranks.items() if r != rank}
    scales = settings if "lora_alpha" in settings else {"lora_alpha": rank, "alpha_pattern": others}
    with_bias = any(key.endswith("lora_B.bias") for key in weights)
    if with_bias:  # peft has one for all or none
        for layer in ranks:
            b = weights[f"{layer}.lora_B.weight"]
            weights.setdefault(f"{layer}.lora_B.bias", b.new_zeros(b.shape[0]))
    own = {
        "target_modules": list(ranks),
        "use_dora": any("magnitude" in key for key in weights),
        "lora_bias": with_bias,
    }
    config = LoraConfig(**{"r": rank, "rank_pattern": others, **scales, **own})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "While injecting the PEFT adapters")  # names that end as another's do
        inject_adapter_in_model(config, module, adapter_name=adapter, state_dict=weights, low_cpu_mem_usage=True)
    found = set_peft_model_state_dict(module, weights, adapter, low_cpu_mem_usage=True)
    if found.unexpected_keys:
        raise ValueError(f"peft has no place for {', '.join(found.unexpected_keys[:3])}")
    if isinstance(module, PeftAdapterMixin):
        module._hf_peft_config_loaded = True


@contextmanager
def _fitting(pipe: Any, lora: object) -> Iterator[None]:
    """Within the context, what goes wrong with a LoRA is a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # of peft, safetensors and the hub, each of which has its own
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

"""LoRA files of any maker: found, read, and brought to diffusers' layout, with what does not fit told apart.

All layouts hold the factors of ΔW = s B A, under other names and with the scale s in other places: kohya's `.alpha` of
each layer (s = alpha / rank), peft's configuration (in the file's header, or beside it), or none (s = 1). Layers by the
original model's names are renamed by the converter of the pipeline's own class in diffusers.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from ..common.errors import UsageError
from ..common.weight_files import loading, read_weights

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
OWN_CONFIG = "lora_config"
SECOND = "transformer_2"
DENOISERS = ("transformer", SECOND, "unet")

_PEFT_NAME, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_DIFFUSERS_CONFIG = "lora_adapter_metadata"  # whose keys begin with the component
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_CONFIG_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")

_LAYOUTS = {
    r"\.(hada_w|lokr_w)\d": "a LyCORIS LoHa or LoKr",
    r"^lora_(unet|te\d?|transformer)_": "a LoRA in kohya's layout",
    r"\.lora_[AB]\.\w+\.weight$|^pipe\.": "a LoRA in DiffSynth's layout",
    r"^base_model\.model\.": "a LoRA in peft's layout",
    r"^(model\.)?diffusion_model\.": "a LoRA in ComfyUI's layout",
    r"^(transformer|unet|text_encoder|connectors)(_\d)?\.": "a LoRA in diffusers' layout",
    r"lora": "a LoRA by the original model's names",
}
_FACTOR = re.compile(
    r"(?P<layer>.+?)\.(lora_|lora\.)(?P<factor>A|B|down|up|mid|magnitude_vector)(\.(?!weight|bias)\w+)?(\.(?P<kind>weight|bias))?$"
)
_OLD_FACTOR = re.compile(r"(\.processor)?\.(to_[qkv]|to_out)_lora\.")  # of diffusers' former attention processors
_FACTORS = {"A": "lora_A", "down": "lora_A", "B": "lora_B", "up": "lora_B"}
_AROUND = re.compile(r"^(base_model\.model\.|module\.|pipe\.|dit\.|(model\.)?diffusion_model\.)+")
_LTX2_TEXT = "text_embedding_projection."  # beside its denoiser
# Of the original models, names that hold an underscore, which kohya's layout has in the place of each dot as well.
_UNDERSCORED = (
    *("self_attn_qkv", "self_attn_proj", "self_attn", "cross_attn", "k_img", "v_img", "img_emb"),
    *("text_embedding", "time_embedding", "patch_embedding", "time_projection"),  # with those before, of Wan
    *("double_blocks", "single_blocks", "img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj", "img_mlp"),
    *("txt_mlp", "img_mod", "txt_mod", "img_in", "txt_in", "individual_token_refiner"),  # of HunyuanVideo
)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as its file has it.

    Attributes:
        path: Of the file.
        weights: By the names of its maker.
        config: Settings of peft that it comes with: `r`, `lora_alpha` and what else of them there is; may be empty.
        layout: What the file is, in words.
    """

    path: Path
    weights: Mapping[str, Tensor]
    config: Mapping[str, Any]
    layout: str


@dataclass(frozen=True)
class FittedLora:
    """A LoRA in diffusers' layout, as far as it fits.

    Attributes:
        weights: By component and `layer.lora_A.weight`; the scale is in A unless the file's own config has it.
        config: As of `LoraFile`.
    """

    weights: Mapping[str, Mapping[str, Tensor]]
    config: Mapping[str, Any]


def lora_file(path: Path) -> Path:
    """The weights that a file's or a folder's path means; a UsageError if they are not there."""
    if path.is_dir():
        found = _choose([p.name for p in path.iterdir() if p.is_file()], str(path))
        if found is None and (path / SECOND).is_dir():
            return lora_file(path / SECOND)  # of a run that trained this one alone
        path = path / (found or WEIGHTS_NAME)
    if not path.is_file():
        raise UsageError(f"there are no LoRA weights {path}; give the folder RUN/lora of a run, or a .safetensors file")
    return path


def download_lora(name: str, file: str | None) -> Path:
    """The weights of a repository on the hub, in its cache.

    Raises:
        UsageError: There are none, or several and no `file` says which.
    """
    from huggingface_hub import hf_hub_download, list_repo_files

    if file is None:
        listed = [f for f in list_repo_files(name) if "/" not in f]
        file = _choose(listed, name)
        if file is None:
            raise UsageError(f"{name} holds no LoRA weights at its top level; name the `file`")
        if file == _PEFT_NAME and _PEFT_CONFIG in listed:
            hf_hub_download(name, _PEFT_CONFIG)
    return Path(hf_hub_download(name, file))


def _choose(files: Iterable[str], where: str) -> str | None:
    weights = sorted(name for name in files if name.endswith(_SUFFIXES))
    for known in (WEIGHTS_NAME, _PEFT_NAME):
        if known in weights:
            return known
    safe = [name for name in weights if name.endswith(".safetensors")] or weights
    if len(safe) > 1:
        raise UsageError(f"{where} holds several files of weights: {', '.join(safe[:8])}; name one of them")
    return safe[0] if safe else None


def open_lora(path: Path) -> LoraFile:
    """Read a file; a torch file may hold tensors alone (`weights_only`).

    Raises:
        UsageError: It is damaged, empty, or no LoRA.
    """
    with loading(f"the LoRA {path}", "a .safetensors file, or a torch file of tensors alone"):
        weights = read_weights(path)
        header: Mapping[str, str] = {}
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
    if not weights:
        raise UsageError(f"the LoRA {path} holds no weights; it was not saved whole")
    what = next((text for pattern, text in _LAYOUTS.items() if any(re.search(pattern, key) for key in weights)), "")
    if not what:
        raise UsageError(f"{path} is no LoRA: it holds weights such as {min(weights)!r}")
    beside = path.parent / _PEFT_CONFIG
    if OWN_CONFIG in header or _DIFFUSERS_CONFIG in header:
        saved = json.loads(header.get(OWN_CONFIG) or header[_DIFFUSERS_CONFIG])
    else:
        saved = json.loads(beside.read_text(encoding="utf-8")) if path.name == _PEFT_NAME and beside.is_file() else {}
    plain = {key.rpartition(".")[2]: value for key, value in saved.items() if key.partition(".")[0] != "text_encoder"}
    return LoraFile(path, weights, {key: plain[key] for key in _CONFIG_KEYS if key in plain}, what)


def fit_lora(pipe: Any, file: LoraFile, partial: bool = False, second: bool = False) -> FittedLora:
    """Bring a LoRA to diffusers' layout, for the components of a pipeline.

    Args:
        pipe: Of diffusers.
        file: As its maker wrote it.
        partial: Whether to leave out what does not fit.
        second: Whether it is for `transformer_2`, of Wan 2.2's pair of transformers.

    Raises:
        UsageError: It fits nowhere, or only a part of it does and `partial` is false: what is left over, and why.
    """
    names = _components(pipe, second)
    layers = {name: dict(pipe.components[target].named_modules()) for name, target in names.items()}
    denoiser = next(name for name in layers if name in DENOISERS)
    known, foreign, left = _sort(file.weights, layers, denoiser)
    converted, lost = _converted(pipe, foreign)
    left |= lost
    fitting: dict[str, dict[str, Tensor]] = {}
    for (component, layer), parts in _by_layer(known | converted):
        reason = _misfit(layers.get(component, {}).get(layer), parts)
        if reason:
            left[f"{component}.{layer}"] = reason
        else:
            fitting.setdefault(names[component], {}).update({f"{layer}.{key}": value for key, value in parts.items()})
    count = sum(key.endswith("lora_A.weight") for weights in fitting.values() for key in weights)
    if not count or (left and not partial):
        fits = f"fits in {count} layers only" if count else "cannot be loaded: nothing of it fits"
        remedy = "give one of this model" + ", or allow a part of it by `partial`" * bool(count)
        raise UsageError(
            f"the LoRA {file.path} cannot be loaded into {type(pipe).__name__}: {file.layout} that {fits}; "
            f"left over: {in_words(left)}; {remedy}"
        )
    return FittedLora(fitting, file.config)


def _components(pipe: Any, second: bool) -> dict[str, str]:
    """The components that a LoRA can be on, by their names in files."""
    denoisers = [name for name in DENOISERS if pipe.components.get(name) is not None]
    if second:
        if SECOND not in denoisers:
            raise UsageError(f"a LoRA of {SECOND} cannot be loaded into {type(pipe).__name__}, which has none")
        return {"transformer": SECOND, SECOND: SECOND}
    others = [name for name in getattr(pipe, "_lora_loadable_modules", ()) if name not in DENOISERS]
    return {name: name for name in [*denoisers, *others] if pipe.components.get(name) is not None}


Named = dict[str, Tensor]


def _sort(
    weights: Mapping[str, Tensor], layers: Mapping[str, Mapping[str, nn.Module]], denoiser: str
) -> tuple[Named, Named, dict[str, str]]:
    """Weights by diffusers' names `component.layer.lora_A.weight`, by the original model's names, and what is neither.

    The factor A is multiplied by alpha / rank where a layer has an alpha.
    """
    known: Named = {}
    foreign: Named = {}
    left: dict[str, str] = {}
    for layer, parts in _factors(weights, left):
        component, name = _place(layer, layers, denoiser)
        exists = name in layers.get(component, {})
        for key, value in parts.items():
            if exists:
                known[f"{component}.{name}.{key.replace('diff_b', 'lora_B.bias')}"] = value
            elif component == denoiser:
                foreign[f"{name}.{key}"] = value
            else:
                left[f"{component}.{name}"] = "no such layer"
    return known, foreign, left


def _factors(weights: Mapping[str, Tensor], left: dict[str, str]) -> Iterator[tuple[str, Named]]:
    """Each layer with its factors; other weights go to `left`, with what they are."""
    layers: dict[str, Named] = {}
    alphas: Named = {}
    for original, value in weights.items():
        key = _OLD_FACTOR.sub(lambda m: f".{m[2]}{'.0' * (m[2] == 'to_out')}.lora.", original)
        match = _FACTOR.fullmatch(key)
        if match and match["factor"] == "magnitude_vector":
            layers.setdefault(match["layer"], {})["lora_magnitude_vector"] = value
        elif match and match["factor"] in _FACTORS:
            layers.setdefault(match["layer"], {})[f"{_FACTORS[match['factor']]}.{match['kind'] or 'weight'}"] = value
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = value
        elif key.endswith(".diff_b") and value.any():
            layers.setdefault(key.removesuffix(".diff_b"), {})["diff_b"] = value
        elif not key.endswith((".diff", ".diff_b")) or value.any():  # zeros change nothing
            left[original] = "DoRA of kohya's kind" if key.endswith("dora_scale") else "no factor of a LoRA"
    for layer, parts in layers.items():
        if layer in alphas and "lora_A.weight" in parts:
            factor = parts["lora_A.weight"]
            parts["lora_A.weight"] = factor.float() * (float(alphas[layer]) / factor.shape[0])
        yield layer, parts


def _place(layer: str, layers: Mapping[str, Mapping[str, nn.Module]], denoiser: str) -> tuple[str, str]:
    """The component of a layer and its name there, as far as the maker's prefix and the model tell."""
    if kohya := re.match(r"lora_(unet|transformer|te(?P<second>2?)1?)_(?P<layer>.+)", layer):
        text = kohya[1].startswith("te")
        component = f"text_encoder{'_2' * bool(kohya['second'])}" if text else denoiser
        dotted = {name.replace(".", "_"): name for name in layers.get(component, {})}
        name = kohya["layer"]
        if text and name not in dotted:
            name = name.removeprefix("text_model_")  # a level that transformers has given up
        if name in dotted or text:
            return component, dotted.get(name, name)
        for whole in _UNDERSCORED:
            name = name.replace(whole, whole.replace("_", "\0"))
        return component, name.replace("_", ".").replace("\0", "_")
    name = _AROUND.sub("", layer)
    component, _, rest = name.partition(".")
    if component in layers or re.fullmatch(r"(transformer|unet|text_encoder|connectors)(_\d)?", component):
        if component.startswith("text_encoder") and rest not in layers.get(component, {}):
            rest = rest.removeprefix("text_model.")
        is_original = component == "transformer" and rest not in layers.get(component, {})
        return (denoiser if is_original else component), rest
    return denoiser, name


def _converted(pipe: Any, foreign: Named) -> tuple[Named, dict[str, str]]:
    """Weights by diffusers' names, from the original model's; and those that diffusers does not convert."""
    if not foreign:
        return {}, {}
    left = dict.fromkeys(foreign, "no such layer")
    if not hasattr(pipe, "lora_state_dict"):
        return {}, left
    given = {key if key.startswith(_LTX2_TEXT) else f"diffusion_model.{key}": value for key, value in foreign.items()}
    try:
        with _quiet("diffusers.loaders"):
            found = type(pipe).lora_state_dict(dict(given))
    except Exception as error:  # each converter has its own way to refuse
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        return {}, dict.fromkeys(left, f"not converted by diffusers: {type(error).__name__} {reason}")
    found = found[0] if isinstance(found, tuple) else found
    converted = {key: value for key, value in found.items() if key not in given}
    # A converter hands tensors on, or views of them; of a weight that it dropped, or made anew, there is none.
    places = sorted(value.data_ptr() for value in converted.values())
    for key, value in foreign.items():
        if any(value.data_ptr() <= place < value.data_ptr() + value.nbytes for place in places):
            del left[key]
    return converted, left


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _by_layer(weights: Named) -> Iterator[tuple[tuple[str, str], Named]]:
    layers: dict[tuple[str, str], Named] = {}
    for key, value in weights.items():
        component, _, rest = key.partition(".")
        layer, _, factor = rest.rpartition(".lora_")
        layers.setdefault((component, layer), {})[f"lora_{factor}"] = value
    yield from layers.items()


def _misfit(module: nn.Module | None, parts: Named) -> str:
    """Why a layer's factors do not fit a module; empty if they do."""
    if module is None:
        return "no such layer"
    a, b = parts.get("lora_A.weight"), parts.get("lora_B.weight")
    if a is None or b is None:
        return "one of the two factors is missing"
    layer = getattr(module, "base_layer", module)
    weight = getattr(layer, "weight", None)
    if weight is None or weight.ndim not in (2, 4, 5):
        return f"the layer is a {type(module).__name__}"
    # A quantised weight is stored in another shape.
    own = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(weight.shape)
    given = (b.shape[0], *a.shape[1:])
    if given != own or a.shape[0] != b.shape[1]:
        return f"{tuple(a.shape)} and {tuple(b.shape)} for a weight of {own}"
    if "lora_B.bias" in parts and getattr(layer, "bias", None) is None:
        return "a bias, which the layer has not"
    return ""


def in_words(left: Mapping[str, str], most: int = 12) -> str:
    """Names with their reasons, numbered blocks together."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for name, reason in left.items():
        block = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        head, number, tail = block.groups() if block else (name, "", "")
        groups.setdefault((head, tail if number else "", reason), []).extend([int(number)] if number else [])
    listed: dict[str, list[str]] = {}
    for (head, tail, reason), numbers in groups.items():
        listed.setdefault(reason, []).append(f"{head}{_ranges(numbers)}{tail}")
    texts = []
    for reason, names in listed.items():
        more = f" and {len(names) - most} more" if len(names) > most else ""
        texts.append(f"{', '.join(names[:most])}{more} ({reason})")
    return "; ".join(texts[:6]) + (f"; and {len(texts) - 6} other reasons" if len(texts) > 6 else "")


def _ranges(numbers: list[int]) -> str:
    """`3` or `0-3`, `0-3+5`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "+".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)

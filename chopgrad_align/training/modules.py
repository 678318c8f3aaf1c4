"""Full training of chosen modules of a pipeline: a denoiser's blocks, or a VAE's decoder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..common.arguments import nearest
from ..common.errors import UsageError

MODULES_NAME = "modules.safetensors"


class Modules:
    """All weights of some modules of a pipeline, by their names `component.module.weight`.

    A weight of lower precision gets a float32 master, which is what is trained, and is its rounded value: updates of a
    bfloat16 weight would fall below its rounding step. The weights as they were stay on the CPU, for `base`.

    Args:
        pipe: Frozen otherwise.
        modules: Regular expressions of whole names, such as `transformer.blocks.1.ffn` or `vae.decoder.conv_out`.

    Raises:
        UsageError: An expression that matches no module with weights, or a weight that tells the pipeline its type.
    """

    def __init__(self, pipe: Any, modules: Sequence[str]) -> None:
        self._parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        dtypes = {name: part.dtype for name, part in self._parts.items()}
        chosen = _chosen(self._parts, modules)
        # A list first: adding a master changes the tree of modules.
        owners = {
            f"{name}.{path}.{key}" if path else f"{name}.{key}": (owner, key)
            for name, module in chosen.items()
            for path, owner in module.named_modules()
            for key in owner._parameters
            if owner._parameters[key] is not None
        }
        self._base = {name: getattr(owner, key).detach().clone() for name, (owner, key) in owners.items()}
        self._weights = {name: _master(owner, key) for name, (owner, key) in owners.items()}
        self.parameters = list(self._weights.values())
        for name, part in self._parts.items():
            if part.dtype != dtypes[name]:
                raise UsageError(
                    f"trainable.args.modules: the first weight of {name}, by whose type a pipeline knows that of the "
                    "model, cannot have a float32 master; leave it out, or set model.dtype (of the vae: "
                    "model.vae_dtype) to float32"
                )

    def train(self) -> None:
        """Leave layers as in inference: nothing is drawn in them."""

    def eval(self) -> None:
        """See `train`."""

    @contextmanager
    def base(self) -> Iterator[None]:
        """Put the weights as they were in place within the context."""
        trained = {name: weight.data for name, weight in self._weights.items()}
        try:
            for name, weight in self._weights.items():
                weight.requires_grad_(False).data = self._base[name].to(weight)
            yield
        finally:
            for name, weight in self._weights.items():
                weight.data = trained[name]
                weight.requires_grad_(True)

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights by diffusers' names after that of the component, in float32."""
        return {name: weight.detach().cpu().clone() for name, weight in self._weights.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Trainable`."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(state[name])

    def export(self, folder: Path) -> None:
        """Write `modules.safetensors`, which `load_modules` puts into a pipeline."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / MODULES_NAME, metadata={"format": "pt"})


def load_modules(pipe: Any, folder: Path) -> None:
    """Load the weights that `Modules` exported into a plain pipeline; they are rounded to its type.

    It is `component.load_state_dict(weights, strict=False)` for each component.

    Raises:
        UsageError: The file is not there, or does not fit the pipeline.
    """
    for weight, value in fitted_modules(pipe, folder):
        weight.data.copy_(value)


def fitted_modules(pipe: Any, folder: Path) -> list[tuple[nn.Parameter, Tensor]]:
    """The weights of a pipeline that `Modules` exported others for, each with its value.

    Raises:
        UsageError: As `load_modules`.
    """
    file = folder / MODULES_NAME if folder.is_dir() else folder
    fitted = []
    if not file.is_file():
        raise UsageError(f"there are no trained modules {file}; give the folder RUN/lora of a run that trained modules")
    for name, value in load_file(file).items():
        component, _, path = name.partition(".")
        try:
            weight = pipe.components[component].get_parameter(path)
        except (AttributeError, KeyError) as error:
            raise UsageError(f"{file} does not fit {type(pipe).__name__}, which has no weight {name}") from error
        if weight.shape != value.shape:
            raise UsageError(f"{file} does not fit {type(pipe).__name__}: {name} has {tuple(weight.shape)} there")
        fitted.append((weight, value))
    return fitted


def _chosen(parts: Mapping[str, nn.Module], patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that match, by their whole names; of nested ones the outermost."""
    named = {f"{c}.{path}" if path else c: module for c, part in parts.items() for path, module in part.named_modules()}
    names: set[str] = set()
    for pattern in patterns:
        try:
            found = {
                name for name in named if re.fullmatch(pattern, name) and any(True for _ in named[name].parameters())
            }
        except re.error as error:
            raise UsageError(f"trainable.args.modules: {pattern!r} is not a regular expression ({error})") from error
        if not found:
            raise UsageError(
                f"trainable.args.modules: {pattern!r} matches no module with weights{nearest(pattern, named)}; names "
                f"begin with {', '.join(parts)}"
            )
        names |= found
    inner = {name for name in names if any(name.startswith(f"{other}.") for other in names)}
    return {name: named[name] for name in named if name in names - inner}


def _master(owner: nn.Module, key: str) -> nn.Parameter:
    """The float32 weight behind one of a module, which is the weight itself if it is precise enough."""
    weight = owner._parameters[key]
    assert weight is not None
    if weight.dtype not in (torch.float32, torch.float64):
        parametrize.register_parametrization(owner, key, _Rounded(weight.dtype), unsafe=True)
        weight = owner.get_parameter(f"parametrizations.{key}.original0")
    weight.requires_grad_(True)
    return weight


class _Rounded(nn.Module):
    """A weight as its master's value in lower precision, whose gradient is the master's."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        return master.to(self._dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        return (weight.float(),)  # a tuple, since torch lets a single tensor not change its type

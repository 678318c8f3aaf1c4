"""Finding and reading checkpoints; what goes wrong there becomes one sentence with the remedy."""

from __future__ import annotations

import pickle
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig

from chopgrad_align.errors import UsageError

Model = TypeVar("Model", bound=nn.Module)

HUB_ID = r"[\w-][\w.-]*/[\w.-]+"  # owner/name
# What torch, transformers, open_clip and the hub raise for files that are missing, unreachable, damaged or other ones.
_LOAD_ERRORS = (
    OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError,
    pickle.UnpicklingError, SafetensorError, EntryNotFoundError,
)  # fmt: skip


@contextmanager
def loading(argument: str, expected: str) -> Iterator[None]:
    """Report a failure to load as a `UsageError` that names the argument and what it should have been."""
    try:
        yield
    except UsageError:
        raise
    except _LOAD_ERRORS as error:
        if isinstance(error, pickle.UnpicklingError | EOFError):  # torch's text tells how to run untrusted code
            reason = "it is damaged, or holds Python objects besides tensors"
        elif isinstance(error, KeyError):
            reason = f"it has no {error}"
        else:
            reason = textwrap.shorten(str(error), 250, placeholder=" …").rstrip(".")
        raise UsageError(f"{argument} cannot be loaded: {reason}. Expected {expected}.") from error


def locate(source: str, filename: str) -> Path:
    """A file: `source` itself, or `filename` in the local folder or hub repository (`owner/name`) `source`.

    An address (`https://…`) is downloaded once, to `torch.hub`'s folder.
    """
    if source.startswith("https://"):
        path = Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(source).name)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(source, str(path), progress=False)
        return path
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / filename
    if path.is_file():
        return path
    looks_local = path.suffix in (".pt", ".pth", ".bin", ".safetensors")
    if looks_local or not re.fullmatch(HUB_ID, source):
        raise FileNotFoundError(f"no such file: {path}")
    return Path(hf_hub_download(source, filename))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file, which is read with `weights_only=True`."""
    state: object
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not (isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())):
        raise ValueError(f"{path} holds something else than named tensors")
    return state


def fill_weights(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Fill `module` with `state`, read from `path`; names and shapes must be equal."""
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in state.items()}
    if wanted != given:
        key = sorted(key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key))[0]
        raise ValueError(f"{path} holds other weights: {key!r} is {given.get(key)}, expected {wanted.get(key)}")
    module.load_state_dict(state)


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill `module` from a file that `read_weights` reads; names and shapes must be equal."""
    fill_weights(module, read_weights(path), path)


def load_pretrained(model_class: type[Model], source: str) -> Model:
    """A transformers model in float32 from a hub id or folder; another model or a missing weight is an error."""
    loader: Any = model_class
    kind, wanted = AutoConfig.from_pretrained(source).model_type, loader.config_class.model_type
    if kind != wanted:
        raise ValueError(f"its model type is {kind!r}, not {wanted!r}")
    model, info = loader.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{len(info['missing_keys'])} weights are missing")
    return model

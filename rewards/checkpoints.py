"""Finding and reading checkpoints; what goes wrong there becomes one sentence with the remedy."""

from __future__ import annotations

import pickle
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from chopgrad_align.errors import UsageError

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
        else:
            reason = textwrap.shorten(str(error), 250, placeholder=" …").rstrip(".")
        raise UsageError(f"{argument} cannot be loaded: {reason}. Expected {expected}.") from error


def locate(source: str, filename: str) -> Path:
    """A weights file: `source` itself, or `filename` in the local folder or hub repository (`owner/name`) `source`."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / filename
    if path.is_file():
        return path
    looks_local = path.suffix in (".pt", ".pth", ".bin", ".safetensors")
    if looks_local or not re.fullmatch(HUB_ID, source):
        raise FileNotFoundError(f"no such file: {path}")
    return Path(hf_hub_download(source, filename))


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill `module` from a safetensors file, or from a torch file read with `weights_only=True`; keys must be equal."""
    state: dict[str, Tensor]
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in state.items()}
    if wanted != given:
        key = sorted(key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key))[0]
        raise ValueError(f"{path} holds other weights: {key!r} is {given.get(key)}, expected {wanted.get(key)}")
    module.load_state_dict(state)

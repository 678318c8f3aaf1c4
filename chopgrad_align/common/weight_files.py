"""Reading files of weights; what goes wrong there becomes one sentence with the remedy."""

from __future__ import annotations

import pickle
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import UsageError

# What torch, transformers, open_clip and the hub raise for files that are missing, unreachable, damaged or other ones.
_LOAD_ERRORS = (
    OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError, AssertionError,
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


def difference(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The first weight, by name, that is missing, unexpected or of another shape, in words; empty if there is none."""
    shapes, expected = ({key: tuple(value.shape) for key, value in state.items()} for state in (given, wanted))
    for key in sorted(shapes.keys() | expected.keys()):
        if key not in shapes:
            return f"{key!r} is missing"
        if key not in expected:
            return f"{key!r} is not expected"
        if shapes[key] != expected[key]:
            return f"{key!r} is {shapes[key]}, expected {expected[key]}"
    return ""


def fill_weights(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Fill `module` with `state`, read from `path`; names and shapes must be equal."""
    if found := difference(state, module.state_dict()):
        raise ValueError(f"{path} holds other weights: {found}")
    module.load_state_dict(state)


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill `module` from a file that `read_weights` reads; names and shapes must be equal."""
    fill_weights(module, read_weights(path), path)

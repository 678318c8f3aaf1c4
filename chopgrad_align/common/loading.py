"""Things by name: those of an installed package, and those in a user's own file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from torch import nn

from .arguments import nearest, shown, usable_path
from .errors import UsageError

_SPELLINGS = "a published name, 'package.module:Class' or 'path/to/file.py:Class'"
# What to install for a module whose package is called otherwise, or is an extra of this package.
_INSTALL = {
    "hpsv2": "'chopgrad-align[hps]'",
    "lpips": "'chopgrad-align[metrics]'",
    "open_clip": "open_clip_torch",
    "torchmetrics": "'chopgrad-align[metrics]'",
}


def construct(kind: str, name: str, location: str, args: dict[str, object], **given: object) -> object:
    """Make a thing: call the class at `location`, `module:Class` or `path/to/file.py:Class`, with `args`.

    Args:
        kind: What messages call the thing, `reward` or `loss`.
        name: Its name in the config, for messages.
        location: Where the class is.
        args: The user's arguments, given to it by keyword.
        given: Those of the caller, given so too, and not shown in messages.

    Returns:
        The thing; a `nn.Module` has its weights frozen, is in eval mode and still on the CPU.

    Raises:
        UsageError: The module, file, attribute or an argument is wrong, or a package is not installed.
    """
    what = f"{kind} {name!r}"
    place, _, attribute = location.rpartition(":")
    module = _file(place, kind, what) if _is_path(place) else _module(place, what)
    if not hasattr(module, attribute):
        candidates = [a for a in vars(module) if not a.startswith("_")]
        raise UsageError(f"{what}: {place} has no {attribute!r}{nearest(attribute, candidates)}")
    factory = getattr(module, attribute)
    if not callable(factory):
        raise UsageError(f"{what}: {attribute} is a {type(factory).__name__}, expected a class")
    _check_arguments(factory, what, given | args)
    try:
        made = factory(**given, **args)
    except UsageError:
        raise
    except ModuleNotFoundError as error:  # imported when it is used
        raise _missing(what, error) from error
    except Exception as error:  # the class is someone else's code, and its arguments are the user's
        asked = ", ".join(f"{key}={shown(value)}" for key, value in args.items()) or "no arguments"
        raise UsageError(f"{what} cannot be made with {asked}; it failed {failure(error)}") from error
    if isinstance(made, nn.Module):
        made.requires_grad_(False).eval()
    return made


def construct_known(kind: str, name: str, known: Mapping[str, str], args: dict[str, object], **given: object) -> object:
    """Make a thing by one of the `known` short names, which stand for locations, or else as `construct` does.

    Raises:
        UsageError: As `construct`, or a name without a colon that is none of them.
    """
    if ":" not in name and name not in known:
        raise unknown_name(kind, name, known)
    return construct(kind, name, known.get(name, name), args, **given)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name without a colon that nothing of this kind has."""
    known = sorted(known)
    hint = f"; for a class in that file, write '{name}:Class'." if _is_path(name) else nearest(name, known) or "."
    return UsageError(f"no {kind} is called {name!r}{hint} Known: {', '.join(known)}; or give {_SPELLINGS}")


def _is_path(location: str) -> bool:
    return location.endswith(".py") or "/" in location or "\\" in location


def _module(location: str, what: str) -> ModuleType:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", location):
        raise UsageError(f"{what}: expected {_SPELLINGS}")
    try:
        return importlib.import_module(location)
    except (Exception, SystemExit) as error:  # the module is someone else's code and can fail in any way
        raise _import_error(location, what, error) from error


def _file(location: str, kind: str, what: str) -> ModuleType:
    path = Path(usable_path(location)).expanduser().resolve()
    if not path.is_file():
        raise UsageError(f"{what}: no such file {path}")
    # A private name: the file can be called like any installed module and still hides none.
    private = f"_chopgrad_{kind}_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(private, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{what}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[private] = module  # dataclasses and pickle look the module up by its name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[private]
        raise _import_error(location, what, error) from error
    return module


def _import_error(location: str, what: str, error: BaseException) -> UsageError:
    if isinstance(error, ModuleNotFoundError) and error.name:
        if f"{location}.".startswith(f"{error.name}."):
            return UsageError(
                f"{what}: no module named {error.name!r}; install its package, "
                "or for a file of yours write 'path/to/file.py:Class'"
            )
        return _missing(what, error)
    return UsageError(f"{what}: importing {location} failed {failure(error)}")


@contextmanager
def failing_as_usage_error(what: str) -> Iterator[None]:
    """Let what someone else's code raises within the context be a `UsageError` that says where it was raised."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{what} failed {failure(error)}") from error


def failure(error: BaseException) -> str:
    """The place and the reason of an error in someone else's code."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else f"{last.filename}:{last.lineno}"
    return f"at {place}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _missing(what: str, error: ModuleNotFoundError) -> UsageError:
    package = (error.name or "").partition(".")[0]
    return UsageError(
        f"{what} needs the module {error.name!r}, which is not installed: pip install {_INSTALL.get(package, package)}"
    )


def _check_arguments(factory: object, what: str, args: dict[str, object]) -> None:
    try:
        signature = inspect.signature(factory)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # some built-in callables have none
        return
    try:
        signature.bind(**args)
    except TypeError as error:
        unknown = [a for a in args if a not in signature.parameters]
        hint = (nearest(unknown[0], signature.parameters) if unknown else "") or "."
        accepted = ", ".join(str(p).split(":")[0].split("=")[0] for p in signature.parameters.values()) or "none"
        raise UsageError(f"{what}: {error}{hint} Its arguments: {accepted}") from error

"""Config files: YAML and overrides into a `Config`, with one sentence for what is wrong, and back into YAML."""

from __future__ import annotations

import functools
import math
import operator
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError

from ..common.arguments import nearest, shown, usable_path
from ..common.errors import UsageError
from .config import Config

_MOST_BYTES = 2**20  # of a config
_SHOWN = 5  # mistakes that are named in one message
_INTERPOLATIONS = "_interpolations"  # beside a config's fields: no key, and no part of comparisons


def _package_path(path: str) -> str:
    return str(files("chopgrad_align") / path)


def _configs_path(path: str) -> str:
    return str(files("chopgrad_configs") / path)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a config file (default: the embedded one) and apply overrides.

    A config of the package is also found by its name, such as `sr_x4`, `sr_x4.yaml` or `configs/sr_x4.yaml`, where no
    file has that path.

    `key.sub=value` sets a key, `~key.sub` leaves it out.

    A file that begins with `extends: base.yaml`, or with a list of files, holds what it has beside them or otherwise:
    each is merged over those before it, section by section, and the file over all. Their paths are relative to the
    file's folder.

    `${package:PATH}` and `${configs:PATH}` in a value are files of the installed package and of its configs; paths are
    otherwise relative to the current folder.

    Raises:
        UsageError: No such file, or none that it extends, or a circle of these; not YAML, an unknown key, a wrong type
            or an impossible value: one line with the key, what was expected and the nearest known key.
    """
    OmegaConf.register_resolver("package", _package_path, replace=True)
    OmegaConf.register_resolver("configs", _configs_path, replace=True)
    path = _configs_path("embedded.yaml") if path is None else _config_file(usable_path(str(path)))
    with _readable(f"config {path}"):
        tree = _tree(Path(path))
    for override in overrides:
        if override.startswith("~"):
            _delete(tree, override[1:])
            continue
        if not re.match(r"[^\s=.\[\]-][^=\[\]]*=", override):
            raise UsageError(f"cannot read the override {shown(override)}; write key.sub=value")
        with _readable(f"override {shown(override)}"):
            tree = _merged(tree, override)
    with _readable(f"config {path}"):
        resolved, raw = (
            OmegaConf.to_container(tree, resolve=resolve, throw_on_missing=resolve) for resolve in (True, False)
        )
    config = check_config(resolved, path)
    vars(config)[_INTERPOLATIONS] = dict(_interpolations(raw))
    return config


def _config_file(path: str) -> str:
    """The path of a config, given that or the name of one of the package's."""
    shipped = {name: str(p) for p in Path(_configs_path("")).glob("*.yaml") for name in (p.stem, p.name)}
    if Path(path).is_file():
        return path
    if (name := path.removeprefix("configs/")) in shipped:
        return shipped[name]
    known = ", ".join(sorted(name for name in shipped if name.endswith(".yaml")))
    raise UsageError(f"no config file {path}; in configs/ there are {known}")


def check_config(values: Any, where: str) -> Config:
    """The config that nested dictionaries describe.

    Args:
        values: Plain values by key.
        where: What the user knows it as; errors begin with it.

    Raises:
        UsageError: As `load_config`.
    """
    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        wrong = [*dict.fromkeys(map(_sentence, error.errors()))]
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise UsageError(f"{where}: " + "; ".join(wrong[:_SHOWN] + more)) from error


def _tree(path: Path, above: tuple[Path, ...] = ()) -> DictConfig:
    """The content of a file with that of the files that it extends; `above` are those that extend it."""
    path = Path(os.path.normpath(path))
    if path in above:
        circle = " → ".join(p.name for p in (*above[above.index(path) :], path))
        raise UsageError(f"configs extend each other in a circle: {circle}")
    if above and not path.is_file():
        raise UsageError(f"{above[-1]} extends {path}, which is not there")
    if path.stat().st_size > _MOST_BYTES:
        raise UsageError(f"{path} has more than {_MOST_BYTES:,} bytes; give the YAML file of a run")
    text = path.read_text(encoding="utf-8")
    if "*" in text and _values(yaml.compose(text, yaml.SafeLoader), {}) > _MOST_BYTES:
        raise UsageError(f"{path}: its aliases make it grow beyond measure; write out what is meant")
    tree = OmegaConf.load(path)
    if not isinstance(tree, DictConfig):
        raise UsageError(f"the config {path} must be a mapping of sections, such as run, model and train")
    bases = OmegaConf.to_container(tree).get("extends", [])  # type: ignore[union-attr]
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) and base for base in bases):
        raise UsageError(f"{path}: extends: expected a file or a list of files, got {shown(tree.extends)}")
    tree.pop("extends", None)
    merged = OmegaConf.merge(*(_tree(path.parent / base, (*above, path)) for base in bases), tree)
    return cast(DictConfig, merged)


def _values(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Count the values of a node with its aliases written out; infinite, if one holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = (part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,)))
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def _merged(tree: DictConfig, override: str) -> Any:
    key, _, value = override.partition("=")
    if "???" in value:  # OmegaConf's sign for a value that is missing
        raise UsageError(f"the override {shown(override)} gives no value")
    if value.strip() == "{}" and OmegaConf.select(tree, key):
        raise UsageError(f"the override {override!r} would change nothing; to empty a section, leave out its keys by ~")
    return OmegaConf.merge(tree, OmegaConf.from_dotlist([override]))


def _delete(tree: DictConfig, key: str) -> None:
    with _readable(f"override {shown(f'~{key}')}"):
        section, _, name = key.rpartition(".")
        parent = OmegaConf.select(tree, section) if section else tree
        if not isinstance(parent, DictConfig) or name not in parent:
            raise UsageError(f"the override '~{key}' leaves out a key that the config does not have")
        del parent[name]


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Within the context, what goes wrong with a text of the user's is a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # of the YAML reader and of OmegaConf, which let any kind escape
        raise UsageError(f"cannot read the {what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or a value refers to itself"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"


def _sentence(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    match error["type"]:
        case "unexpected_keyword_argument":
            where = ".".join(location[:-1]) or "the top level"
            known = _known_keys(location[:-1])
            hint = nearest(location[-1], known) or f"; at {where} there are {', '.join(known)}"
            return f"unknown key {shown(key)}{hint}"
        case "missing" | "missing_argument":
            return f"{key!r} is missing"
        case "dataclass_type":
            expected = f"a section with the keys {', '.join(_known_keys(location))}"
        case "value_error":
            return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
        case _:
            expected = error["msg"].removeprefix("Input should be ")
    return f"{key}: expected {expected}, got {shown(error['input'])}"


def _known_keys(location: Sequence[str]) -> list[str]:
    kind: Any = Config
    for part in location:
        kind = get_type_hints(kind)[part] if is_dataclass(kind) else get_args(kind)[1]  # a value of dict[str, kind]
        kind = next(filter(is_dataclass, get_args(kind)), kind) if type(None) in get_args(kind) else kind
    return [f.name for f in fields(kind)] if is_dataclass(kind) else []


def header(config: Config) -> str:
    """The first line of a run's own config: the command that runs it again elsewhere."""
    return f"# chopgrad-align align --config {Path(config.run.folder) / 'config.yaml'} run.folder=NEW\n"


def to_yaml(config: Config) -> str:
    """The whole config, defaults included, as YAML that `load_config` reads back to the same.

    What it takes from elsewhere, such as `${oc.env:TOKEN}`, stands there as it was written.
    """
    tree = TypeAdapter(Config).dump_python(config, mode="json")
    for (*sections, name), text in interpolations(config).items():
        functools.reduce(operator.getitem, sections, tree)[name] = text
    return OmegaConf.to_yaml(tree)


def interpolations(config: Config) -> dict[tuple[str | int, ...], str]:
    """Values that the config takes from elsewhere as they were written, by sections, keys and places in lists."""
    return vars(config).get(_INTERPOLATIONS, {})


def _interpolations(tree: Any, *path: str | int) -> Iterator[tuple[tuple[str | int, ...], str]]:
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _interpolations(value, *path, key)
    elif isinstance(tree, str) and "${" in re.sub(r"\$\{(package|configs):[^{}]*\}", "", tree):
        yield path, tree

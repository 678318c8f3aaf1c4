"""Fingerprints of what a run reads: files and folders that its config names, and revisions of models from the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from .config import Config
from .config_file import interpolations

_SOURCES = re.compile(
    r"data\.(train|held_out)|model\.(name|loras\..*\.name)"
)  # other values may be a folder's by chance
_WRITTEN = ("run.folder", "data.cache")
_TEXT = {".cfg", ".csv", ".json", ".jsonl", ".py", ".toml", ".txt", ".yaml", ".yml"}
_WEIGHTS = {".bin", ".ckpt", ".pt", ".pth", ".safetensors"}
_TAIL = 2**20  # bytes of a file of weights: training changes nearly all of them


def fingerprints(config: Config) -> dict[str, str]:
    """A hash for each key of a config whose value is a file, a folder, a model of the hub, or of the environment.

    Text and code count whole; of files of weights their size and last MiB, of others the size; of folders all files by
    name; of a model of the hub the revision that the cache holds. Dates do not count, so that a copy is the same.
    """
    found = {}
    for key, value in leaves(config):
        if isinstance(value, str) and not key.startswith(_WRITTEN) and (_SOURCES.fullmatch(key) or _is_path(value)):
            found[key] = _of(value)
    for path in interpolations(config):
        key, value = ".".join(map(str, path)), _at(config, path)
        found[key] = (_of(value) if isinstance(value, str) else "") or _short(f"{key}={value!r}")  # may be a secret
    return {key: hashed for key, hashed in found.items() if hashed}


def leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of a config that is no section, by its whole key."""
    if is_dataclass(tree):
        tree = {field.name: getattr(tree, field.name) for field in fields(tree)}
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, tree


def _at(tree: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        tree = getattr(tree, str(part)) if is_dataclass(tree) else tree[part]
    return tree


def _is_path(value: str) -> bool:
    return "/" in value or "\\" in value or Path(value).suffix in _TEXT | _WEIGHTS or ".py:" in value


def _of(value: str) -> str:
    """The fingerprint of what a value names; empty if it names nothing."""
    file, _, attribute = value.rpartition(":")
    path = Path(file if attribute.isidentifier() and file.endswith(".py") else value).expanduser()
    try:
        if path.is_file():
            return _file(path)
        if path.is_dir():
            listing = [f"{p.relative_to(path)} {_file(p)}" for p in sorted(path.rglob("*")) if p.is_file()]
            return hashlib.sha256("\n".join(listing).encode(errors="surrogateescape")).hexdigest()
        if value.count("/") != 1:
            return ""
        folder = repo_folder_name(repo_id=value, repo_type="model")
        return Path(constants.HF_HUB_CACHE, folder, "refs", "main").read_text().strip()
    except (OSError, ValueError):  # not there, or no name that a file can have
        return ""


def _file(path: Path) -> str:
    size = path.stat().st_size
    hashed = hashlib.sha256(f"{size} ".encode())
    if path.suffix in _TEXT | _WEIGHTS:
        with path.open("rb") as file:
            file.seek(max(0, size - _TAIL) if path.suffix in _WEIGHTS else 0)
            while chunk := file.read(_TAIL):
                hashed.update(chunk)
    return hashed.hexdigest()


def _short(text: str) -> str:
    """So little of a hash that nothing can be guessed from it."""
    return hashlib.sha256(text.encode()).hexdigest()[:6]

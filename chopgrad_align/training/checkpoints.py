"""Checkpoints of a run: written whole or not at all, verified when they are read, told from what else lies there."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..common.files import flush_to_disk
from ..common.weight_files import difference

WEIGHTS = "lora.safetensors"
_TENSORS, _PROGRESS, _MANIFEST = "optimizer.pt", "progress.json", "manifest.json"


class Unusable(Exception):
    """A folder that is called like a checkpoint and is none to go on from; the message says why."""


class Checkpoints:
    """The folders `KIND-NNNNNN` of some steps, each with a `manifest.json`: checksums of its files, and facts.

    What has another name or no manifest is someone else's: it is never taken, counted or removed.

    Args:
        folder: Where they are.
        kind: What their names begin with.
    """

    def __init__(self, folder: Path, kind: str = "step") -> None:
        self.folder, self._kind = folder, kind

    def path(self, step: int) -> Path:
        """The folder of a step, which may not be there."""
        return self.folder / f"{self._kind}-{step:06d}"

    def steps(self) -> list[int]:
        """The steps that have a folder of ours, ascending."""
        return [step for step in self._called_so() if self._has_manifest(step)]

    @contextmanager
    def writing(self, step: int, facts: Mapping[str, Any] | None = None) -> Iterator[Path]:
        """Give the body an empty folder to fill, which gets its name when all of it is on the disk.

        Args:
            step: Whose folder it becomes; an older one of ours is replaced, someone else's moved aside.
            facts: Kept in the manifest.
        """
        final = self.path(step)
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        files = {path.name: _checksum(path) for path in sorted(temporary.iterdir())}
        manifest = {"step": step, "files": files, "facts": dict(facts or {})}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        flush_to_disk([*temporary.iterdir(), temporary])
        if final.exists():
            self._make_way(step)
        os.replace(temporary, final)
        flush_to_disk([self.folder])

    def facts(self, step: int) -> dict[str, Any]:
        """The facts that were given to `writing`."""
        return self._manifest(step)["facts"]

    def verify(self, step: int) -> Path:
        """The folder of a step whose files are those that were written.

        Raises:
            Unusable: It is not there, or not whole.
        """
        for name, checksum in self._manifest(step)["files"].items():
            path = self.path(step) / name
            if not path.is_file():
                raise Unusable(f"{name} is missing")
            if _checksum(path) != checksum:
                raise Unusable(f"{name} is damaged (its checksum is another)")
        return self.path(step)

    def newest(self, weights: Mapping[str, Tensor]) -> tuple[int | None, list[str]]:
        """Find the last checkpoint that can be gone on from.

        Args:
            weights: Names and shapes that those of the checkpoint must have.

        Returns:
            Its step, None if there is none, and a sentence about each later one that cannot.
        """
        sentences = []
        for step in reversed(self._called_so()):
            try:
                if found := difference(read_weights(self.verify(step)), weights):
                    raise Unusable(f"it is of another run ({found})")
            except (Unusable, OSError, SafetensorError) as reason:
                sentences.append(f"{self.path(step)} is left out: {reason}")
            else:
                return step, sentences
        return None, sentences

    def keep(self, count: int, until: int) -> None:
        """Remove all of ours up to a step but the last ones; one that someone has put other files into stays."""
        for step in [step for step in self.steps() if step <= until][:-count]:
            self.remove(step)

    def remove(self, step: int) -> None:
        """Remove the folder of a step, unless it holds files that are not ours."""
        path = self.path(step)
        if {file.name for file in path.iterdir()} <= {_MANIFEST, *self._manifest(step)["files"]}:
            discarded = path.with_name(f".{path.name}.old.tmp")
            shutil.rmtree(discarded, ignore_errors=True)
            os.replace(path, discarded)  # first, so that no half of it is ever taken for a checkpoint
            shutil.rmtree(discarded)

    def clean(self) -> None:
        """Remove what a killed process left."""
        for path in self.folder.glob(f".{self._kind}-*.tmp"):
            shutil.rmtree(path)

    def _called_so(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        names = (re.fullmatch(rf"{self._kind}-(\d{{6,}})", path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name and self.path(int(name[1])).name == name[0])

    def _manifest(self, step: int) -> dict[str, Any]:
        try:
            manifest = json.loads((self.path(step) / _MANIFEST).read_text(encoding="utf-8"))
            written = {"step": int(manifest["step"]), "files": dict(manifest["files"]), "facts": manifest["facts"]}
        except FileNotFoundError:
            raise Unusable(f"it has no {_MANIFEST}") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise Unusable(f"{_MANIFEST} is damaged") from error
        if written["step"] != step:
            raise Unusable(f"it is a copy of step {written['step']}")
        return written

    def _has_manifest(self, step: int) -> bool:
        try:
            self._manifest(step)
        except Unusable:
            return False
        return True

    def _make_way(self, step: int) -> None:
        if self._has_manifest(step):
            self.remove(step)
        if (path := self.path(step)).exists():
            names = (path.with_name(f"{path.name}.other{i or ''}") for i in range(10**6))
            os.replace(path, next(name for name in names if not name.exists()))


def write_weights(weights: dict[str, Tensor], folder: Path) -> None:
    """Write the trained weights alone into a folder."""
    # Through Python's own files, whose errors say what is wrong with the disk; safetensors' do not.
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(weights))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the trained weights of a checkpoint, on the CPU."""
    return safetensors.torch.load_file(folder / WEIGHTS)


def write_state(state: dict[str, Any], folder: Path) -> None:
    """Write what `TrainState.state_dict` returned: `weights`, `progress` as JSON, and everything else as torch does."""
    write_weights(state["weights"], folder)
    buffer = io.BytesIO()
    torch.save({key: value for key, value in state.items() if key not in ("weights", "progress")}, buffer)
    (folder / _TENSORS).write_bytes(buffer.getvalue())
    (folder / _PROGRESS).write_text(json.dumps(state["progress"]))


def read_state(folder: Path) -> dict[str, Any]:
    """Read what `write_state` wrote, on the CPU."""
    return {
        "weights": read_weights(folder),
        **torch.load(folder / _TENSORS, map_location="cpu", weights_only=True),
        "progress": json.loads((folder / _PROGRESS).read_text()),
    }


def _checksum(path: Path) -> str:
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            checksum.update(chunk)
    return checksum.hexdigest()

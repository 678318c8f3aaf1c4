"""The run folder: never overwrites a run, writes atomically, and says so when the disk does not let it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UsageError

_NEEDED_BYTES = 200 * 2**20  # sample videos, report and a checkpoint of an ordinary LoRA


class RunFolder:
    """Paths and files of one run.

    `config.yaml`, `metrics.jsonl`, `heldout.json`, `samples/`, `checkpoints/step-NNNNNN/`, `lora/`, `curves.png`,
    `report.html`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.held_out = self.path / "heldout.json"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.lora = self.path / "lora"

    def check(self, resume: bool) -> None:
        """Raise a UsageError if a run (or the continuation of one) cannot be written here."""
        if resume and not self.config.is_file():
            raise UsageError(f"--resume: {self.path} holds no run (no config.yaml); check run.folder")
        if not resume and self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            what = "holds a run already" if self.config.is_file() else "is not empty"
            raise UsageError(
                f"{self.path} {what}, and nothing is overwritten: choose another run.folder=…, delete it, "
                "or continue its run with --resume"
            )
        parent = self.path
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"cannot write to {parent}; choose another run.folder=…")
        free = shutil.disk_usage(parent).free
        if free < _NEEDED_BYTES:
            raise UsageError(
                f"{parent} has {free / 2**20:.0f} MiB free, and a run needs at least {_NEEDED_BYTES / 2**20:.0f}; "
                "free some space or choose another run.folder=…"
            )

    def append(self, row: dict[str, Any]) -> None:
        with said_in_words(self.path), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def write(self, path: Path, text: str) -> None:
        """Write a whole file or nothing."""
        with said_in_words(self.path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)

    @contextmanager
    def checkpoint(self, step: int, keep: int) -> Iterator[Path]:
        """A folder to write into, which gets its name when all of it is there; older checkpoints go after that."""
        with said_in_words(self.path):
            final = self.checkpoints / f"step-{step:06d}"
            temporary = self.checkpoints / f".{final.name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
            for old in self.all_checkpoints()[:-keep]:
                shutil.rmtree(old)

    def all_checkpoints(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*"))

    def latest_checkpoint(self) -> Path:
        found = self.all_checkpoints()
        if not found:
            raise UsageError(f"--resume: {self.checkpoints} holds no checkpoint; start again in another run.folder=…")
        return found[-1]


@contextmanager
def said_in_words(folder: Path) -> Iterator[None]:
    """A full disk or missing permission is the user's to mend, in a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UsageError(f"the disk of {folder} is full; free some space and continue with --resume") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UsageError(f"cannot write {error.filename}: {error.strerror}") from error
        raise

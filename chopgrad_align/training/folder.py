"""The run folder: never overwrites a run, writes atomically, and says so when the disk does not let it."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..common.errors import UsageError
from ..common.files import whole_file

_OTHER_BYTES = 100 * 2**20  # sample videos and report


class RunFolder:
    """Paths and files of one run.

    `config.yaml`, `metrics.jsonl`, `heldout/`, `heldout.json`, `samples/`, `checkpoints/step-NNNNNN/` and
    `checkpoints/best-NNNNNN/`, `lora/`, `curves.png`, `report.html`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.held_out = self.path / "heldout.json"
        self.measurements = self.path / "heldout"
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
        self.check_space()

    def check_space(self, checkpoints_bytes: int = 0) -> None:
        """Raise a UsageError if the disk cannot take a run whose checkpoints need so many bytes."""
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        free, needed = shutil.disk_usage(parent).free, checkpoints_bytes + _OTHER_BYTES
        if free < needed:
            raise UsageError(
                f"{parent} has {free / 2**20:.0f} MiB free, and this run needs {math.ceil(needed / 2**20)}; "
                "free some space or choose another run.folder=…"
            )

    def append(self, row: dict[str, float]) -> None:
        """Add a row to `metrics.jsonl`; what is not finite, which JSON cannot say, becomes null."""
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        with os_errors_as_usage_errors(self.path), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")

    def rewind(self, step: int) -> None:
        """Forget the rows after `step`, and one that was cut off: a resumed run writes them again."""
        kept = (line for line in self._lines() if json.loads(line)["step"] <= step)
        self.write(self.metrics, "".join(kept))

    def _lines(self) -> list[str]:
        with os_errors_as_usage_errors(self.path):
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]  # the last one may have been cut off

    def write(self, path: Path, text: str) -> None:
        """Write a whole file or nothing."""
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")

    @contextmanager
    def checkpoint(self, step: int, keep: int) -> Iterator[Path]:
        """A folder to write into, which gets its name when all of it is there; older checkpoints go after that."""
        with self._whole(self.checkpoints / f"step-{step:06d}") as temporary:
            yield temporary
        with os_errors_as_usage_errors(self.path):
            for old in self.all_checkpoints()[:-keep]:
                shutil.rmtree(old)

    @contextmanager
    def best(self, step: int) -> Iterator[Path]:
        """A folder for the weights of a step that was measured to be the best so far; whole or not there."""
        with self._whole(self._best(step)) as temporary:
            yield temporary

    def forget_best(self, but: int | None) -> None:
        """Remove the weights of steps that are the best no more."""
        kept = None if but is None else self._best(but)
        for old in self.checkpoints.glob("best-*"):
            if old != kept and old.name.removeprefix("best-").isdecimal():
                shutil.rmtree(old)

    def weights(self, step: int) -> Path | None:
        """The folder with the weights of a step, if they are still there."""
        return next((f for f in (self._best(step), self.checkpoints / f"step-{step:06d}") if f.is_dir()), None)

    def _best(self, step: int) -> Path:
        return self.checkpoints / f"best-{step:06d}"

    @contextmanager
    def _whole(self, final: Path) -> Iterator[Path]:
        """Another name to write a folder to; it gets its own when all of it is there."""
        with os_errors_as_usage_errors(self.path):
            temporary = final.with_name(f".{final.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)

    def show_as_after(self, step: int) -> None:
        """Let `samples/after` be the samples of a step, if it has any."""
        source, after = self.samples / f"step-{step:06d}", self.samples / "after"
        if source.is_dir():
            shutil.rmtree(after, ignore_errors=True)
            shutil.copytree(source, after)

    def all_checkpoints(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*"))

    def latest_checkpoint(self) -> Path:
        found = self.all_checkpoints()
        if not found:
            raise UsageError(f"--resume: {self.checkpoints} holds no checkpoint; start again in another run.folder=…")
        return found[-1]


@contextmanager
def os_errors_as_usage_errors(folder: Path) -> Iterator[None]:
    """A full disk or missing permission is the user's to mend, in a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _os_error(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise UsageError(f"the disk of {folder} is full; free some space and continue with --resume") from error
        if isinstance(error, OSError) and number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UsageError(f"cannot write {error.filename}: {error.strerror}") from error
        raise


def _os_error(error: SafetensorError) -> int | None:
    found = re.search(r"\(os error (\d+)\)", str(error))  # all that the library tells of it
    return int(found[1]) if found else None

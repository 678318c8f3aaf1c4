"""The run folder: never overwrites a run, writes atomically, and says so when the disk does not let it."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ..common.errors import UsageError
from ..common.files import flush_to_disk, whole_file
from .checkpoints import Checkpoints, Unusable

_OTHER_BYTES = 100 * 2**20  # sample videos and report


class RunFolder:
    """Paths and files of one run.

    `config.yaml`, `environment.json`, `metrics.jsonl`, `resumed.jsonl`, `trace.json.gz`, `heldout/`, `heldout.json`,
    `samples/`, `checkpoints/step-NNNNNN/` and `checkpoints/best-NNNNNN/`, `lora/`, `curves.png`, `report.html`.

    Attributes:
        checkpoints: From which a run goes on.
        best: The weights of steps that were measured to be the best.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.resumed = self.path / "resumed.jsonl"
        self.environment = self.path / "environment.json"
        self.trace = self.path / "trace.json.gz"
        self.held_out = self.path / "heldout.json"
        self.measurements = self.path / "heldout"
        self.samples = self.path / "samples"
        self.report = self.path / "report.html"
        self.lora = self.path / "lora"
        self._lock = self.path / ".lock"
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self.best = Checkpoints(self.path / "checkpoints", "best")

    def check(self, resume: bool) -> None:
        """Raise a UsageError if a run (or the continuation of one) cannot be written here."""
        self._expect_room(resume)
        parent = self.path
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"cannot write to {parent}; choose another run.folder=…")
        self.check_space()

    def _expect_room(self, resume: bool) -> None:
        """Raise a UsageError if the folder holds something else than what is asked for; hidden files do not count."""
        if not self.path.exists() or (resume and self.config.is_file()):
            return
        if self.path.is_dir() and all(path.name.startswith(".") for path in self.path.iterdir()):
            return
        if resume:
            raise UsageError(f"--resume: {self.path} is not empty and holds no run (no config.yaml); check run.folder")
        what = "holds a run already" if self.config.is_file() else "is not empty"
        raise UsageError(
            f"{self.path} {what}, and nothing is overwritten: choose another run.folder=…, delete it, "
            "or continue its run with --resume"
        )

    def expect_no_owner(self) -> None:
        """Raise a UsageError if a process is training in this folder."""
        if self._lock.is_file():
            with self._owner():
                pass

    @contextmanager
    def owned(self, resume: bool) -> Iterator[None]:
        """Make this process the only one that writes here; the system ends that when the process ends.

        Raises:
            UsageError: Another process does, or has come first with a run of its own.
        """
        with os_errors_as_usage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with self._owner():
            self._expect_room(resume)
            yield

    @contextmanager
    def _owner(self) -> Iterator[None]:
        lock = FileLock(self._lock)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"another process is training in {self.path}; wait until it has ended, or choose another run.folder=…"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def is_complete(self, steps: int) -> bool:
        """True if a run of so many steps has left everything that it leaves."""
        try:
            held_out = json.loads(self.held_out.read_text(encoding="utf-8"))
            last = held_out["steps"].get("last", held_out["steps"]["after"])
            return (
                last == steps
                and not held_out.get("interim")
                and self.report.stat().st_mtime >= self.held_out.stat().st_mtime
            )
        except (OSError, ValueError, KeyError):
            return False

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

    def note_environment(self, environment: Mapping[str, str]) -> None:
        """Add to `environment.json`, a list with an object for each start of the run."""
        try:
            starts = json.loads(self.environment.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            starts = []  # the first; what cannot be read is not worth a run
        known = starts if isinstance(starts, list) else []
        self.write(self.environment, json.dumps([*known, dict(environment)], indent=1))

    def rewind(self, step: int) -> None:
        """Forget the rows after `step`, and one that was cut off: a resumed run writes them again."""
        if self.metrics.is_file():
            self.write(self.metrics, "".join(line for of, line in self._rows() if of <= step))

    def last_row(self) -> int:
        """The step of the last row of metrics; 0 if there is none."""
        return max((of for of, _ in self._rows()), default=0) if self.metrics.is_file() else 0

    def _rows(self) -> list[tuple[int, str]]:
        """The step and the line of each row; a last one that was cut off is left out."""
        with os_errors_as_usage_errors(self.path):
            lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                if line.endswith("\n"):
                    rows.append((int(json.loads(line)["step"]), line))
            except (ValueError, TypeError, KeyError) as error:
                raise UsageError(
                    f"{self.metrics}, line {number}: expected a JSON object with a `step`; correct or delete it"
                ) from error
        return rows

    def clean(self) -> None:
        """Remove what a killed process left half written."""
        for path in self.path.rglob(".*.partial"):
            path.unlink(missing_ok=True)
        self.checkpoints.clean()
        self.best.clean()

    def write(self, path: Path, text: str) -> None:
        """Write a whole file or nothing."""
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")

    def note_resume(self, step: int, changes: Mapping[str, Any]) -> None:
        """Add what a resumed run changes, from which step on, to `resumed.jsonl`."""
        with os_errors_as_usage_errors(self.path), self.resumed.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "changed": changes}) + "\n")

    @contextmanager
    def checkpoint(self, step: int, keep: int, facts: Mapping[str, Any] | None = None) -> Iterator[Path]:
        """A folder to write into, which gets its name when all of it is there; older checkpoints go after that."""
        with os_errors_as_usage_errors(self.path):
            # What a resumed run does not write again is on the disk before what it resumes from.
            written = [path for path in (self.metrics, *self.measurements.glob("*")) if path.is_file()]
            flush_to_disk([*written, *{path.parent for path in written}])
            with self.checkpoints.writing(step, facts) as temporary:
                yield temporary
            self.checkpoints.keep(keep, until=step)

    @contextmanager
    def best_weights(self, step: int) -> Iterator[Path]:
        """A folder for the weights of a step that was measured to be the best so far; whole or not there."""
        with os_errors_as_usage_errors(self.path), self.best.writing(step) as temporary:
            yield temporary

    def forget_best(self, but: int | None) -> None:
        """Remove the weights of steps that are the best no more."""
        for step in self.best.steps():
            if step != but:
                self.best.remove(step)

    def weights(self, step: int) -> Path | None:
        """The folder with the weights of a step that was the best, if it is still there and whole."""
        try:
            return self.best.verify(step)
        except Unusable:
            return None

    @contextmanager
    def exporting(self) -> Iterator[Path]:
        """An empty folder to export to; its files go to `lora/`, each in the place of its predecessor, at the end."""
        temporary = self.path / ".lora.tmp"
        with os_errors_as_usage_errors(self.path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            files = [path for path in temporary.rglob("*") if path.is_file()]
            flush_to_disk(files)
            for path in files:
                place = self.lora / path.relative_to(temporary)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
            shutil.rmtree(temporary)

    def show_as_after(self, step: int) -> None:
        """Let `samples/after` be the samples of a step, if it has any."""
        source, after = self.samples / f"step-{step:06d}", self.samples / "after"
        if source.is_dir():
            shutil.rmtree(after, ignore_errors=True)
            shutil.copytree(source, after)


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

"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UsageError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the body another name beside `path` to write to; what is there at its end gets the name `path`.

    An existing file is replaced, missing folders are made. If the body fails, the old file stays as it was and nothing
    is left beside it.

    Raises:
        UsageError: The disk does not let it: the body, or the renaming, failed with an OSError.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}; free some space, or choose a place that can be written to"
        ) from error


def flush_to_disk(paths: Iterable[Path]) -> None:
    """Make files and folders (their entries, not what is in them) survive a loss of power.

    On Windows only files, since folders cannot be opened there.
    """
    windows = os.name == "nt"
    for path in paths:
        if windows and path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""A run that still trains, watched from outside by what it leaves in its folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path


def measurements(run: Path, seconds: float = 5.0) -> Iterator[None]:
    """Yield at once, and then whenever the run has measured something or ended, without end.

    Args:
        run: Its folder.
        seconds: Between two looks.
    """
    known = None
    while True:
        found = {
            path: path.stat().st_mtime_ns for path in (*run.glob("heldout/step-*.json"), *run.glob("heldout.json"))
        }
        if found != known:
            known = found
            yield
        time.sleep(seconds)

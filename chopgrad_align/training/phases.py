"""Time and memory of the phases of a step."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

try:
    import resource
except ImportError:  # there is none on Windows
    resource = None  # type: ignore[assignment]

_COUNTED = ("cuda", "xpu")  # devices of their own memory that torch keeps count of


class Phases:
    """Seconds in named phases of a step; a phase inside another counts for the inner one alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._mark()
        self._open.append(name)
        try:
            with record_function(name):  # for `--profile`
                yield
        finally:
            self._mark()
            self._open.pop()

    def _mark(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)  # or the work would be counted where it is waited for
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now

    def collect(self) -> dict[str, float]:
        """`seconds/NAME` since the last collection, and `peak_memory_gib`.

        That is of the device if it counts its own memory, else the most that the process ever had; left out where the
        system does not say.
        """
        row = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        if self._device.type in _COUNTED:
            device = torch.get_device_module(self._device)
            peak = device.max_memory_allocated(self._device)
            device.reset_peak_memory_stats(self._device)
        elif resource is not None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        else:
            return row
        return {**row, "peak_memory_gib": peak / 2**30}

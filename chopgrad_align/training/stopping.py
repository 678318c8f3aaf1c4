"""Requests to end a run early: signals, and the death of the launcher."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from ..common.errors import Interrupted
from .parallel import Replicas

_SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1") if name in signal.Signals.__members__]
# What `accelerate launch` and torchrun set for the processes that they start.
_LAUNCHED = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")


class StopRequests:
    """SIGINT, SIGTERM and SIGUSR1 within a context, taken down for someone who asks; a second one ends the process.

    A launcher that is gone counts as SIGTERM: `accelerate launch` passes none on, and leaves the process without a
    parent. Only a launcher: whoever starts a run by hand in the background may log out. Signals that were ignored, as
    SIGINT is in background jobs of a shell script, still are; in another thread than the main one, where Python takes
    no handlers, signals do what they did.

    Args:
        say: Whether to print a line on a signal.
    """

    def __init__(self, say: bool = True) -> None:
        self._say, self._number, self._before = say, 0, dict[int, Any]()
        self._launcher = os.getppid() if any(name in os.environ for name in _LAUNCHED) else None

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._take_down)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def number(self) -> int:
        """Number of the signal that came; 0: none did."""
        if not self._number and self._launcher not in (None, os.getppid()):
            self._number = signal.SIGTERM
        return self._number

    def stop_if_any(self, parallel: Replicas) -> None:
        """Raise Interrupted if any process was asked to stop; all of them do then, at the same place."""
        if number := parallel.greatest(self.number()):
            raise Interrupted(number)

    def wait(self, seconds: float) -> int:
        """The number, waited for so long while there is none."""
        until = time.monotonic() + seconds
        while not self.number() and time.monotonic() < until:
            time.sleep(0.1)
        return self.number()

    def _take_down(self, number: int, frame: FrameType | None) -> None:
        if self._number:
            os._exit(128 + number)
        self._number = number
        if self._say:  # past Python's buffers, which a signal may have come in the middle of
            os.write(2, f"\n{signal_name(number)}: saving after this step; a second signal ends at once\n".encode())


def signal_name(number: int) -> str:
    """Name of a signal, such as SIGTERM."""
    return signal.Signals(number).name

"""A trace of some training steps, to look at in Perfetto or chrome://tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule, supported_activities


@contextmanager
def profiled(steps: int, path: Path) -> Iterator[Callable[[], None]]:
    """Trace steps, after one to warm up, and write the file when they are over; give the body what to call after each.

    Phases of a step have their names in the trace. While it is recorded, a step takes longer and more host memory.

    Args:
        steps: How many; 0: nothing is done.
        path: Of the file, which the profiler compresses if the name ends in `.gz`.
    """
    if not steps:
        yield lambda: None
        return
    activities = {ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()
    with profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda recorded: recorded.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler.step

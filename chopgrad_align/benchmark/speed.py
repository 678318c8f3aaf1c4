"""Table (d): time, as the ratio of medians to plain autograd in one run with interleaved repetitions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..decoding.backprop import Exact, Truncated
from ..decoding.decode import FrameLoss, decode
from .measure import seconds
from .rows import REFERENCE, Method, Row

FORWARD = "forward alone"

_EXACT, _FUSED = Row(Exact(checkpoint=False)).name, Row(Truncated(0, checkpoint=False), fused=True).name
GOALS = {"cpu": {_EXACT: 1.0, _FUSED: 0.75}, "cuda": {_EXACT: 1.4, _FUSED: 1.05}}
"""Most time that a row should take, as a ratio to plain autograd."""


def measure_speed(
    vae: nn.Module, methods: Mapping[str, Method], latents: Tensor, loss: FrameLoss, repetitions: int
) -> Any:
    """Seconds of every method and of a forward pass alone, with ratios of medians to the reference."""

    def forward() -> None:
        with torch.no_grad():
            decode(vae, latents)

    runs: dict[str, Callable[[], object]] = {FORWARD: forward}
    for name, method in methods.items():
        runs[name] = lambda method=method: method(vae, latents, loss)  # type: ignore[misc]
    times = seconds(runs, repetitions, latents.device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "seconds": times,
        "ratio": {name: median / medians[REFERENCE] for name, median in medians.items()},
        "goal": {name: goal for name, goal in GOALS[latents.device.type].items() if name in runs},
    }

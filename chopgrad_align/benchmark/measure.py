"""Measure bytes and seconds, on CPU and on CUDA."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..common.storage_count import StorageCount
from ..decoding.decode import FrameLoss
from .rows import Method


def peak_bytes(method: Method, vae: nn.Module, latents: Tensor, loss: FrameLoss) -> int | None:
    """The most device memory that a method takes at once, besides the weights and the latents.

    On CUDA it is what the allocator says, and `None` where memory runs out. On CPU the storages that operations make
    are counted, without those that are offloaded to the host.
    """
    if latents.device.type != "cuda":
        with StorageCount() as storage:
            method(vae, latents, loss)
        return storage.peak
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        method(vae, latents, loss)
    except torch.cuda.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated() - before


def seconds(runs: dict[str, Callable[[], object]], repetitions: int, device: torch.device) -> dict[str, list[float]]:
    """Times of each run, after one to warm up; interleaved, so that a slow moment of the machine falls on all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if repetition:
                times[name].append(time.perf_counter() - start)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

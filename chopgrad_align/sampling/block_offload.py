"""Frozen weights of a denoiser's blocks in host memory, from which they come to the device for their block's turn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..common.errors import UsageError
from ..decoding.offload import Host
from .denoisers import blocks_of


def offload_blocks(denoiser: nn.Module, device: torch.device) -> int:
    """Move the frozen weights of a denoiser's blocks to host memory, for good, and return their bytes.

    When a block runs, forwards, recomputed or backwards, its weights are on the device, and those of the block that is
    expected next are on their way. Trained weights, and all outside of the blocks, stay what and where they are. In the
    backward pass blocks have to run again one by one: a graph that was kept would keep the weights on the device.

    Args:
        denoiser: A block is an entry of one of its module lists.
        device: On which the blocks run.

    Raises:
        UsageError: It has no blocks, or blocks whose parts run again by themselves, as those of a U-Net.
    """
    blocks = blocks_of(denoiser)
    if not blocks or any(hasattr(part, "gradient_checkpointing") for block in blocks for part in block.modules()):
        raise UsageError(
            f"model.offload=blocks: {type(denoiser).__name__} has no blocks that run again one by one; leave it out"
        )
    return _OffloadedBlocks(blocks, device).nbytes


class _OffloadedBlocks:
    """Blocks whose `forward` fetches their weights.

    Attributes:
        nbytes: Of the weights in host memory.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._place, self._last, self.nbytes = Host(device), 0, 0
        self._weights = [_frozen(block) for block in blocks]
        self._stored = []
        for number, (block, weights) in enumerate(zip(blocks, self._weights, strict=True)):
            self._stored.append(self._place.offload([weight for *_, weight in weights]))
            self._place.synchronize()
            for *_, weight in weights:
                self.nbytes += weight.nbytes
                weight.data = weight.data.new_empty(0)
            block.forward = self._fetching(number, block.forward)

    def _fetching(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._on_device(number):
                return forward(*args, **kwargs)

        return run

    @contextmanager
    def _on_device(self, number: int) -> Iterator[None]:
        values: list[Any] = self._place.load(self._stored[number])
        self._place.prefetch(*self._next(number))
        # In the place of the parameters, and not in their storage: a graph keeps what it was recorded with.
        for (module, name, _), value in zip(self._weights[number], values, strict=True):
            module._parameters[name] = value
        del values
        try:
            yield
        finally:
            for module, name, weight in self._weights[number]:
                module._parameters[name] = weight

    def _next(self, number: int) -> Sequence[Any]:
        """The block that is expected next, if there is one: blocks run forwards, and in the backward pass backwards."""
        way, self._last = number - self._last, number
        if abs(way) != 1:
            way = 1 if number == 0 else -1
        return self._stored[number + way : number + way + 1] if number + way >= 0 else []


def _frozen(block: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [
        (module, name, weight)
        for module in block.modules()
        for name, weight in module._parameters.items()
        if weight is not None and not weight.requires_grad
    ]

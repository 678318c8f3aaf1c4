"""Where tensors wait between their uses: beside the model, or in host memory.

What a place holds goes in and comes out as any nesting of lists, tuples and dicts with tensors as leaves. On CUDA the
copies run on a stream of their own, through pinned memory, so that they hide behind the compute of other blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .memory import on_host


class Place(ABC):
    @abstractmethod
    def put(self, values: Any) -> Any:
        """Put values away; returns what `get` takes. The caller lets go of its own references."""

    @abstractmethod
    def fetch(self, stored: Any) -> None:
        """Begin to bring values back that `get` will be asked for next."""

    @abstractmethod
    def get(self, stored: Any) -> Any:
        """The values; they may be asked for again."""


class Device(Place):
    """Beside the model: nothing moves."""

    def put(self, values: Any) -> Any:
        return values

    def fetch(self, stored: Any) -> None:
        pass

    def get(self, stored: Any) -> Any:
        return stored


class Host(Place):
    """In host memory. On a machine without CUDA this copies as well, so that it counts and tests the same."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._fetched: dict[int, list[Any]] = {}

    def put(self, values: Any) -> Any:
        leaves, structure = tree_flatten(values)
        return _Stored([self._to_host(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)

    def fetch(self, stored: Any) -> None:
        # Only where it hides behind compute; it takes the memory of what is fetched for the time of a block.
        if self._stream is not None and stored is not None and id(stored) not in self._fetched:
            # What was put last may still be on its way out on this stream, in order before the way back.
            with torch.cuda.stream(self._stream):
                self._fetched[id(stored)] = self._to_device(stored)

    def get(self, stored: Any) -> Any:
        if stored is None:
            return None
        self.fetch(stored)
        if self._stream is None:
            return tree_unflatten(self._to_device(stored), stored.structure)
        leaves = self._fetched.pop(id(stored))
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                leaf.record_stream(current)  # made on the other stream, freed by this one
        return tree_unflatten(leaves, stored.structure)

    def _to_host(self, tensor: Tensor) -> Tensor:
        with on_host():
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None)
        if self._stream is None:
            return host.copy_(tensor.detach())
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self._stream)  # so that its memory is not used again before it is copied
        return host

    def _to_device(self, stored: _Stored) -> list[Any]:
        return [
            leaf.to(self._device, non_blocking=True, copy=True) if isinstance(leaf, Tensor) else leaf
            for leaf in stored.leaves
        ]


class _Stored:
    def __init__(self, leaves: list[Any], structure: Any) -> None:
        self.leaves, self.structure = leaves, structure

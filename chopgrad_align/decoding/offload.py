"""Places for tensors between their uses: beside the model, or in host memory.

A place takes and returns any nesting of lists, tuples and dicts with tensors as leaves. On CUDA the copies run on a
stream of their own, through pinned memory, so that they hide behind the compute of other blocks.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..common.storage_count import on_host

_SMALLEST_PIECE = 2**20
"""Bytes of pinned memory up to which a tensor's last piece may have any size; torch rounds up less than this."""


class Place(ABC):
    """A place for the caches, inputs and cotangents of blocks until they are needed again."""

    @abstractmethod
    def offload(self, values: Any) -> Any:
        """Begin to put values away, and return what `load` takes. The caller lets go of its own references."""

    @abstractmethod
    def prefetch(self, *stored: Any) -> None:
        """Begin to bring values back that `load` will be asked for next; `None` among them is passed over."""

    @abstractmethod
    def load(self, stored: Any) -> Any:
        """Return the values, `None` for `None`; they may be loaded again."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all that was offloaded has arrived, and let go of it here."""


class Device(Place):
    """Device memory, beside the model: nothing moves."""

    def offload(self, values: Any) -> Any:
        return values

    def prefetch(self, *stored: Any) -> None:
        pass

    def load(self, stored: Any) -> Any:
        return stored

    def synchronize(self) -> None:
        pass


class Host(Place):
    """Host memory; without CUDA this copies and holds in the same order, so that it counts and tests the same."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream_of_copies(device) if device.type == "cuda" else None
        self._in_transit: tuple[Any, list[Tensor]] | None = None
        self._prefetched: dict[_Stored, tuple[list[Any], Any]] = {}

    def offload(self, values: Any) -> Any:
        leaves, structure = tree_flatten(values)
        tensors = [_dense(leaf.detach()) for leaf in leaves if isinstance(leaf, Tensor)]
        hosts = [_OnHost(tensor, pinned=self._stream is not None) for tensor in tensors]
        with self._on_stream_of_copies():
            for host, tensor in zip(hosts, tensors, strict=True):
                for piece, part in host.pieces_of(tensor):
                    piece.copy_(part, non_blocking=self._stream is not None)
        copied = None if self._stream is None else self._stream.record_event()
        # Held until they are copied; and the CPU waits for those before, or it would run ahead and nothing be freed.
        self.synchronize()
        self._in_transit = copied, tensors
        in_order = iter(hosts)
        return _Stored([next(in_order) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)

    def prefetch(self, *stored: Any) -> None:
        for one in stored:
            if one is None or one in self._prefetched:
                continue
            # Memory of the stream that computes: the other one would keep what is freed for itself.
            leaves = [leaf.empty(self._device) if isinstance(leaf, _OnHost) else leaf for leaf in one.leaves]
            with self._on_stream_of_copies():
                for host, leaf in zip(one.leaves, leaves, strict=True):
                    if isinstance(host, _OnHost):
                        for piece, part in host.pieces_of(leaf):
                            part.copy_(piece, non_blocking=self._stream is not None)
            self._prefetched[one] = leaves, None if self._stream is None else self._stream.record_event()

    def load(self, stored: Any) -> Any:
        if stored is None:
            return None
        self.prefetch(stored)
        leaves, arrived = self._prefetched.pop(stored)
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)
        return tree_unflatten(leaves, stored.structure)

    def synchronize(self) -> None:
        if self._in_transit is not None and (copied := self._in_transit[0]) is not None:
            copied.synchronize()
        self._in_transit = None

    @contextmanager
    def _on_stream_of_copies(self) -> Iterator[None]:
        """Run the context's copies after what has been computed so far, beside what will be computed next."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield


@functools.cache
def _stream_of_copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@dataclass(eq=False)
class _Stored:
    leaves: list[Any]
    structure: Any


class _OnHost:
    """Room for a tensor in host memory, in pieces of powers of two: to these torch rounds up what it pins."""

    def __init__(self, tensor: Tensor, pinned: bool) -> None:
        self._dtype, self._shape, self._strides = tensor.dtype, tensor.shape, tensor.stride()
        lengths = _powers_of_two(tensor.numel(), _SMALLEST_PIECE // tensor.element_size())
        with on_host():
            self._pieces = [torch.empty(n, dtype=tensor.dtype, device="cpu", pin_memory=pinned) for n in lengths]

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty_strided(self._shape, self._strides, dtype=self._dtype, device=device)

    def pieces_of(self, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each piece with its part of a tensor of this shape and these strides."""
        flat = tensor.as_strided((tensor.numel(),), (1,))
        return zip(self._pieces, flat.split([len(piece) for piece in self._pieces]), strict=True)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, if its elements fill a stretch of memory in some order; otherwise a copy that does."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    other = formats.get(tensor.dim())
    if other is not None and tensor.is_contiguous(memory_format=other):
        return tensor
    return tensor.contiguous()


def _powers_of_two(total: int, smallest: int) -> list[int]:
    """Numbers that add up to the total: powers of two, but for the last one, which is at most `smallest`."""
    parts = []
    while total > smallest:
        parts.append(1 << (total.bit_length() - 1))
        total -= parts[-1]
    return [*parts, total] if total else parts

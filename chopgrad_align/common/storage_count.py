"""A count of the storage that is alive: the same on every machine, so that tests can assert memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_on_host = ContextVar("on_host", default=False)


@contextmanager
def on_host() -> Iterator[None]:
    """Count what is allocated within the context as host memory, whatever its device says.

    Only the code that moves tensors can tell: without a GPU, the device of a simulated run is the CPU too.
    """
    token = _on_host.set(True)
    try:
        yield
    finally:
        _on_host.reset(token)


class StorageCount(TorchDispatchMode):
    """A context that counts bytes of the tensor storages that operations make, until they are freed.

    What existed before, such as weights and inputs, does not count, and neither does scratch memory inside a kernel.
    It counts real tensors and, under `torch._subclasses.FakeTensorMode`, the tensors that a model of any size would
    have made.

    Attributes:
        now: Bytes alive on the device at this moment.
        peak: The most that were alive there at once.
        host, host_peak: The same of what was offloaded to host memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.host = self.host_peak = 0
        self._sizes: dict[int, tuple[int, bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        uncounted = [storage for storage in _storages(result) if storage._cdata not in self._sizes]
        if uncounted:
            known = {storage._cdata for storage in _storages((args, kwargs))}
            for storage in uncounted:
                if storage._cdata not in known and storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes(), _on_host.get()
                    self._add(storage.nbytes(), _on_host.get())
                    weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, key: int) -> None:
        size, host = self._sizes.pop(key)
        self._add(-size, host)

    def _add(self, size: int, host: bool) -> None:
        if host:
            self.host += size
            self.host_peak = max(self.host_peak, self.host)
        else:
            self.now += size
            self.peak = max(self.peak, self.now)


def _storages(values: Any) -> list[UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]

"""CUDA streams without CUDA: copies run as late as the program's waiting allows, and never before.

On the stream of copies every copy is queued, and runs when its event is waited for. It copies NaN if its source was not
computed by then (the stream did not wait for the one that computes) or is not alive any more. Room that nothing was
copied to holds NaN. So a wait that is missing gives wrong values.
"""

import weakref
from collections import deque
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chopgrad_align.decoding import offload

WAITS = ("wait_stream", "wait_event", "synchronize")


class Streams:
    """The two streams. `ignored` is a kind of waiting, one of `WAITS`, that has no effect."""

    def __init__(self, ignored=None):
        self.compute, self.copies = Compute(ignored), Copies(ignored)

    def install(self, monkeypatch):
        """Let `Host` use these streams, whatever its device; returns the list of all that are made from now on."""
        init, make_room, empty, places = offload.Host.__init__, offload._OnHost.__init__, offload._OnHost.empty, []

        def with_streams(place, device):
            init(place, device)
            place._stream = self.copies
            places.append(place)

        def room(self, tensor, pinned):
            make_room(self, tensor, pinned=False)
            for piece in self._pieces:
                _poison(piece)

        monkeypatch.setattr(offload.Host, "__init__", with_streams)
        monkeypatch.setattr(offload._OnHost, "__init__", room)
        monkeypatch.setattr(offload._OnHost, "empty", lambda self, device: _poison(empty(self, device)))
        monkeypatch.setattr(torch.cuda, "stream", Copies.current)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.compute)
        return places


class Compute:
    """The stream that computes, at once."""

    def __init__(self, ignored):
        self._ignored = ignored

    def wait_event(self, event):
        if self._ignored != "wait_event":
            event.run()


class Copies:
    """The stream of copies."""

    def __init__(self, ignored):
        self._ignored, self._queue = ignored, deque()
        self._done, self._waited = 0, False

    def wait_stream(self, other):
        assert isinstance(other, Compute)
        self._waited = self._ignored != "wait_stream"

    def record_event(self):
        return Event(self, self._done + len(self._queue), self._ignored)

    @contextmanager
    def current(self):
        with _Queueing(self):
            yield
        self._waited = False  # what is computed from now on has to be waited for again

    def add(self, destination, source):
        self._queue.append((_View(destination), _View(source) if self._waited else None))

    def run_until(self, position):
        while self._done < position:
            destination, source = self._queue.popleft()
            self._done += 1
            _copy(destination.tensor(), source and source.tensor())


class Event:
    def __init__(self, stream, position, ignored):
        self._stream, self._position, self._ignored = stream, position, ignored

    def run(self):
        self._stream.run_until(self._position)

    def synchronize(self):
        if self._ignored != "synchronize":
            self.run()


class _Queueing(TorchDispatchMode):
    def __init__(self, stream):
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self._stream.add(*args[:2])
            return args[0]
        assert "empty" not in func.__name__, "memory that the stream of copies would keep for itself"
        return func(*args, **(kwargs or {}))


class _View:
    """A tensor that does not keep its memory alive."""

    def __init__(self, tensor):
        self._storage = weakref.ref(tensor.untyped_storage())
        self._dtype, self._place = tensor.dtype, (tensor.storage_offset(), tensor.shape, tensor.stride())

    def tensor(self):
        storage = self._storage()
        return None if storage is None else torch.empty(0, dtype=self._dtype).set_(storage, *self._place)


def _copy(destination, source):
    if destination is not None:
        _poison(destination) if source is None else destination.copy_(source)


def _poison(tensor):
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(-1)

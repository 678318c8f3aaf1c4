"""The next thing is made by a thread while the last one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Prefetched(Iterator[T]):
    """Results of a function for each of some arguments, in order; iterated over within its context.

    One thread makes the next result while the caller is busy with the last, and is gone when the context is left. What
    the function raises is raised where that result is asked for.

    Args:
        function: Must not depend on what the caller does meanwhile.
        arguments: Of each call.
    """

    def __init__(self, function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> None:
        self._function, self._arguments = function, iter(arguments)
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._next: Future[T] | None = None

    def __enter__(self) -> Prefetched[T]:
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __next__(self) -> T:
        if self._next is None:
            raise StopIteration
        result = self._next.result()
        self._start()
        return result

    def _start(self) -> None:
        arguments = next(self._arguments, None)
        self._next = None if arguments is None else self._pool.submit(self._function, *arguments)

"""Replacement of a method of one object, for the time of a context."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from ..common.errors import UsageError


@contextlib.contextmanager
def replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Within the context `owner.name(...)` is `method(original, owner, ...)`, for this object alone.

    Raises:
        UsageError: The method is replaced already; but `forward` may be, as hooks of other libraries do, and so may
            `set_timesteps`, as the planner does.
    """
    before = vars(owner).get(name)
    if before is not None and name not in ("forward", "set_timesteps"):
        raise UsageError(
            f"rollout: {type(owner).__name__}.{name} is replaced already, by a rollout under way or by other code"
        )
    bound = getattr(owner, name)
    original = bound.__func__ if before is None else lambda self, *args, **kwargs: bound(*args, **kwargs)

    # A bound method, so that a deep copy of the owner calls it with the copy; and with the class's own signature, in
    # which pipelines look for arguments.
    @functools.wraps(getattr(type(owner), name))
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(original, self, *args, **kwargs)

    vars(owner)[name] = types.MethodType(replacement, owner)
    try:
        yield
    finally:
        if before is None:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before

"""Keys and values of earlier sections, which a denoiser writes into a cache between sections and reads in the next one.

They are constants: no gradient passes through them. There is one cache, into which the next section's are written over
the last one's; so before a call is run again in the backward pass, the cache is filled again for its section.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..decoding.reproducible_state import ReproducibleState


class KeyValueCache:
    """The calls that fill a cache, of which the last one's result is in it."""

    def __init__(self) -> None:
        self._held: Callable[[], Any] | None = None

    def fill(self, call: Callable[[], Any], denoiser: nn.Module) -> Any:
        """Run a call of the denoiser that writes into the cache all that the next section reads."""
        state = ReproducibleState(next(denoiser.parameters()).device)

        def again() -> Any:
            with state.restore():
                return call()

        self._held = again
        return call()

    def refill(self) -> Callable[[], None]:
        """A function that makes the cache what it is now."""
        wanted = self._held

        def restore() -> None:
            if wanted is not None and self._held is not wanted:
                wanted()
                self._held = wanted

        return restore

"""The state in which code first ran, so that it can run again the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


class ReproducibleState:
    """The autocast and random state at the moment when this object is made."""

    def __init__(self, device: torch.device) -> None:
        kinds = {device.type, "cpu"}
        self._autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        self._random = torch.get_rng_state()
        self._device = device
        self._device_random = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def restore(self, random: bool = True) -> Iterator[None]:
        """Run the context in that state, and return to the present one; without `random`, autocast alone."""
        with ExitStack() as stack:
            if random:
                stack.enter_context(torch.random.fork_rng([] if self._device_random is None else [self._device]))
                torch.set_rng_state(self._random)
                if self._device_random is not None:
                    torch.cuda.set_rng_state(self._device_random, self._device)
            for kind, enabled, dtype in self._autocast:
                # Without autocast's cache, which could hold weights that were cast when no gradient was recorded.
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield

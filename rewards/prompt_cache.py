"""Features of prompts, computed once each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class PromptCache:
    """Remembers what a text encoder made of each prompt.

    Args:
        encode: n different texts -> their features `(n, ...)`, all rows of the same shape.
        capacity: How many prompts are kept; when they would be more, it starts again from none.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor], capacity: int = 4096) -> None:
        self._encode = encode
        self._capacity = capacity
        self._features: dict[str, Tensor] = {}

    @torch.no_grad()  # a prompt has nothing to learn
    def __call__(self, prompts: list[str]) -> Tensor:
        """N texts, repeated or not -> `(N, ...)`, without a gradient."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._features]
        if missing:
            if len(self._features) + len(missing) > self._capacity:
                self._features.clear()
                missing = list(dict.fromkeys(prompts))
            self._features.update(zip(missing, self._encode(missing), strict=True))
        return torch.stack([self._features[prompt] for prompt in prompts])

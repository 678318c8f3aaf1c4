"""Exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """The average `a ← decay a + (1 - decay) θ` after each step; at first a is the θ before any.

    Args:
        parameters: θ.
        decay: In [0, 1).

    Attributes:
        weights: a, where the parameters are.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters, self._update = parameters, get_ema_multi_avg_fn(decay)
        self.weights = [parameter.detach().clone() for parameter in parameters]

    def update(self) -> None:
        """Take in the weights after a step."""
        self.weights = [a.to(p.device) for a, p in zip(self.weights, self._parameters, strict=True)]
        self._update(self.weights, [parameter.detach() for parameter in self._parameters], 0)

    def apply(self) -> None:
        """Overwrite the weights with their average."""
        _copy(self.weights, self._parameters)

    def load(self, weights: Sequence[Tensor]) -> None:
        """Take over the `weights` of another."""
        _copy(weights, self.weights)


@torch.no_grad()
def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    for value, into in zip(source, target, strict=True):
        into.copy_(value)

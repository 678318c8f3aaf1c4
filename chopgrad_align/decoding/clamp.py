"""The clamp of pixels to their range, with a choice of its gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .decoders.base import Clamp


def straight_through_clamp(low: float, high: float) -> Clamp:
    """A clamp to [low, high] whose gradient is the identity, as if there were no clamp."""
    return lambda x: _StraightThrough.apply(x, low, high)


def plain_clamp(low: float, high: float) -> Clamp:
    """A clamp to [low, high] with its own gradient, zero where it has an effect."""
    return partial(torch.clamp, min=low, max=high)


def denormalized(pixels: Tensor, clamp: Clamp) -> Tensor:
    """Pixels in [-1, 1] as pipelines of diffusers return them, in [0, 1]; `clamp` is to that range."""
    return clamp(pixels * 0.5 + 0.5)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        return torch.clamp(x, min=low, max=high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None

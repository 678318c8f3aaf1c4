"""The clamp of pixels to their range, with the gradient that a policy asks for."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .backprop import Backprop
from .decoders.base import Clamp


def clamp_of(backprop: Backprop, low: float = -1.0, high: float = 1.0) -> Clamp:
    """A clamp to [low, high] whose gradient at saturated pixels is that of `backprop.saturated`."""
    if backprop.saturated == "zero":
        return partial(torch.clamp, min=low, max=high)
    return lambda x: _PassThrough.apply(x, low, high)


def denormalized(pixels: Tensor, clamp: Clamp) -> Tensor:
    """Pixels in [-1, 1] as pipelines of diffusers return them, in [0, 1]; `clamp` is to that range."""
    return clamp(pixels * 0.5 + 0.5)


class _PassThrough(torch.autograd.Function):
    """Clamp whose gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        return torch.clamp(x, min=low, max=high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None

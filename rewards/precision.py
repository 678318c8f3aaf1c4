"""Heads and last products in float32, whatever type the weights of a model have."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only


def wide(x: Tensor) -> Tensor:
    """`x` in float32 at least; what is no floating-point number stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def in_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in float32 at least, as `InFloat32` of it is, whose weights keep their names."""
    return F.linear(wide(x), wide(layer.weight), None if layer.bias is None else wide(layer.bias))


class InFloat32(nn.Module):
    """A layer that computes in float32 at least, also with weights in half precision.

    A score is a small difference of large numbers: in bfloat16 a hundred times a cosine similarity of 0.2 comes in
    steps of 0.125, more than what sets two videos apart.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights = {name: wide(weight) for name, weight in self.layer.named_parameters()}
        args, kwargs = tree_map_only(Tensor, wide, (args, kwargs))
        return functional_call(self.layer, weights, args, kwargs)

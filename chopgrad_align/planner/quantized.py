"""Stand-ins for quantised linear layers: of the bytes that they store, and of the memory that they compute with.

No library's kernel runs on fake tensors. A stand-in makes a whole weight in the type of its input, forwards and
backwards, for the time of one product, as the kernels do at most.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training.quantization import Quantization
from ..training.quantized_linear import Dequantize, differentiated


def quantize_stand_ins(model: nn.Module, kind: Quantization, left_out: set[str]) -> None:
    """Replace the linear layers of a model of fake tensors.

    Args:
        model: Of diffusers or of transformers.
        kind: Of the quantisation.
        left_out: Names, or parts of names, of layers that are not quantised.
    """
    for name, layer in [*model.named_modules()]:
        whole = name in left_out or left_out & {*name.split(".")}
        if isinstance(layer, nn.Linear) and not whole:
            layer.__class__ = _StandIn
            layer.weight = nn.Parameter(_packed(layer.weight, kind), requires_grad=False)


def _packed(weight: Tensor, kind: Quantization) -> Tensor:
    return weight.new_empty(kind.nbytes(*weight.shape), dtype=torch.uint8)


class _StandIn(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        """Compute with a weight that is made for it."""
        shape = self.out_features, self.in_features
        whole: Dequantize = lambda weight, dtype: weight.new_empty(shape, dtype=dtype)  # noqa: E731

        def kernel(x: Any) -> Tensor:
            return F.linear(x, whole(self.weight, x.dtype), self.bias)

        return differentiated(x, kernel, self.weight, whole)

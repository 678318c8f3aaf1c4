"""Linear layers of quantised weights, with a gradient that keeps no copy of a weight.

Of `y = x Wᵀ + b` with `W = dequantize(q)` only q is stored. The gradient `dL/dx = dL/dy W` makes W again, so that a
weight is whole for the time of one product. Autograd through torchao's kernels would keep every W until its backward
pass, and with them the model that was quantised to save memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Dequantize = Callable[[Tensor, torch.dtype], Tensor]
"""Makes a whole weight `(out, in)` of a type."""


def recompute_weights(model: nn.Module, weight: str, dequantize: Dequantize) -> None:
    """Give the linear layers of a frozen model, whose weights are of a class of this name, such a gradient.

    Outputs stay what the library's own kernel makes without a graph, also where there is one.
    """
    classes: dict[str, type[nn.Linear]] = {}
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and type(layer.weight).__name__ == weight:
            if "support_avx512bf16_for_cpu" in vars(layer):
                # bitsandbytes would pack the weight for inference at the first call, after which there is no gradient.
                vars(layer)["support_avx512bf16_for_cpu"] = False
            kind = type(layer).__name__
            layer.__class__ = classes.setdefault(kind, _recomputing(type(layer), dequantize))


def _recomputing(cls: type[nn.Linear], dequantize: Dequantize) -> type[nn.Linear]:
    """The subclass of a linear layer's class that does so; peft and diffusers know layers by the class."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return differentiated(x, super(recomputing, self).forward, self.weight, dequantize)

    recomputing: Any = type(cls.__name__, (cls,), {"forward": forward})
    return recomputing


def differentiated(x: Tensor, kernel: Callable[[Tensor], Tensor], weight: Tensor, dequantize: Dequantize) -> Tensor:
    """The output of a kernel for `x (…, in)`, with the gradient that goes through a weight made again."""
    y: Tensor = _Linear.apply(x, kernel, weight, dequantize)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernel: Callable[[Tensor], Tensor], weight: Tensor, dequantize: Dequantize
    ) -> Tensor:
        ctx.weight, ctx.dequantize = weight, dequantize  # constants, as every quantised weight
        return kernel(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient @ ctx.dequantize(ctx.weight, gradient.dtype), None, None, None

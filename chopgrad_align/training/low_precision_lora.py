"""Float32 LoRAs on a denoiser of lower precision that keep no float32 copies of its activations.

peft casts the input of every adapted layer to the adapter's type, and autograd keeps the copy: of one bfloat16 hidden
state, queries, keys and values would keep three more of twice its size. Here the input is kept as it is, which the
layers share, and cast again in the backward pass. Outputs and gradients are the same to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


def save_low_precision_inputs(denoiser: nn.Module) -> None:
    """Change the LoRAs of a denoiser so; without dropout only, whose output is the input of the adapter.

    Variants such as DoRA compute with the input itself, in the precision that it comes in.
    """
    for layer in denoiser.modules():
        if not isinstance(layer, LoraLayer) or layer.lora_variant:
            continue
        if all(isinstance(drop, nn.Identity) for drop in layer.lora_dropout.values()):
            down = list(layer.lora_A.values())
            if all(type(part) is nn.Linear for part in down):
                layer.cast_input_dtype_enabled = False
                for part in down:
                    part.__class__ = _Down


class _Down(nn.Linear):
    """`lora_A`."""

    def forward(self, input: Tensor) -> Tensor:
        # Autocast casts both itself.
        if input.dtype == self.weight.dtype or torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        return _Cast.apply(input, self.weight)


class _Cast(torch.autograd.Function):
    """A linear map without a bias in the weight's type, of an input that is kept in its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = (gradient @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2).to(weight.dtype)
        return of_x, of_weight

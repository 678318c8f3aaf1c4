"""The rows of the benchmark, as data: another lever of the engine is another line in `POLICIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields

import torch
from torch import Tensor, nn

from ..decoding.backprop import Backprop, Exact, Full, Truncated
from ..decoding.decode import FrameLoss, decode, decode_loss

Method = Callable[[nn.Module, Tensor, FrameLoss], Tensor]
"""`f(vae, latents, loss) -> gradient`: the gradient of the loss of a clip with respect to its latents, made somehow."""


@dataclass(frozen=True)
class Row:
    """Decode by a policy, then the loss; or both group by group, with `fused`."""

    policy: Backprop
    fused: bool = False

    @property
    def name(self) -> str:
        """The policy as code spells it, without what is left at its default."""
        arguments: list[str] = []
        for field in fields(self.policy):
            value = getattr(self.policy, field.name)
            if field.default is MISSING:
                arguments.insert(0, repr(value))
            elif value != field.default:
                arguments.append(f"{field.name}={value!r}")
        return f"{type(self.policy).__name__}({', '.join(arguments)})" + (", fused" if self.fused else "")

    def __call__(self, vae: nn.Module, latents: Tensor, loss: FrameLoss) -> Tensor:
        if self.fused:
            return gradient(latents, lambda z: decode_loss(vae, z, loss, self.policy))
        return gradient(latents, lambda z: loss_of(decode(vae, z, self.policy), loss))


def gradient(latents: Tensor, evaluate: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient of `evaluate(latents)`, a scalar, with respect to the latents."""
    leaf = latents.detach().requires_grad_()  # a leaf of its own: what made the latents is not this measurement's
    return torch.autograd.grad(evaluate(leaf), leaf)[0]


def loss_of(pixels: Tensor, loss: FrameLoss) -> Tensor:
    """The loss of pixels `(B, C, F, H, W)` that start with the first frame of the clip."""
    return loss(pixels, slice(0, pixels.shape[2]))


_EACH = [(True, True), (True, False), (False, True), (False, False)]

_ROWS = [
    Row(Full()),
    *(Row(Exact(checkpoint=again, memory_efficient_layers=layers)) for again, layers in _EACH),
    Row(Exact(checkpoint=True, rows=16)),
    Row(Exact(checkpoint=True, cache="host")),
    Row(Exact(checkpoint=True, cache="host", rows=16)),
    Row(Exact(checkpoint=False, cache="host")),
    Row(Exact(checkpoint=False, cache="recompute")),
    Row(Truncated(0)),
    *(Row(Truncated(0, checkpoint=again, memory_efficient_layers=layers), fused=True) for again, layers in _EACH),
    Row(Truncated(1)),
    Row(Truncated(2)),
]

POLICIES: dict[str, Row] = {row.name: row for row in _ROWS}

REFERENCE = Row(Full()).name
"""The row whose gradient is the exact one by definition, and that times are divided by."""

EXACT = Row(Exact()).name

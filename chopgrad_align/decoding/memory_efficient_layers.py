"""Layers that keep less for their backward pass, put in place of the usual ones while a graph is recorded.

Plain autograd keeps the input of every convolution, because a trained weight would need it; a frozen one does not. For
a normalisation with its activation it keeps several tensors, some upcast to float32; all of them follow from the input,
which is there anyhow. Gradients are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary
from torch.utils.checkpoint import checkpoint

from . import onednn


class MemoryEfficientLayers(TorchFunctionMode):
    """A context in which frozen convolutions keep no input, and `framewise` keeps its input only.

    Convolutions under autocast are left alone: it casts inside them.

    Args:
        insensitive_to_rounding: The layers leave rounding small. Then the run that is recorded may round otherwise than
            the one without a graph, where that is faster (`onednn`).
    """

    def __init__(self, insensitive_to_rounding: bool = False) -> None:
        super().__init__()
        self._round_freely = insensitive_to_rounding

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is framewise:
            return _framewise_recomputed(*args)
        if (input_gradient := _CONVOLUTIONS.get(func)) is not None:
            return _convolution(func, input_gradient, self._round_freely, *args, **kwargs)
        return func(*args, **kwargs)


def framewise(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Apply layers in turn to `x` `(B, C, F, H, W)`, of which each treats every frame alone (normalisation over
    channels, activation)."""
    if has_torch_function_unary(x):
        return handle_torch_function(framewise, (x,), layers, x)
    for layer in layers:
        x = layer(x)
    return x


def _framewise_recomputed(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    # A frame at a time, so that what is upcast to float32 is that of one frame, in the backward pass too.
    if any(weight.requires_grad for layer in layers for weight in layer.parameters()) or _is_autocast(x):
        frames = [checkpoint(framewise, layers, frame, use_reentrant=False) for frame in x.split(1, 2)]
        return frames[0] if len(frames) == 1 else torch.cat(frames, 2)
    return _FrozenFramewise.apply(layers, x)


class _FrozenFramewise(torch.autograd.Function):
    """`framewise` that keeps its input; cheaper than a checkpoint for each frame, but without gradients of weights."""

    @staticmethod
    def forward(ctx: Any, layers: Sequence[nn.Module], x: Tensor) -> Tensor:
        ctx.layers = layers
        ctx.save_for_backward(x)
        if x.shape[2] == 1:
            return framewise(layers, x)
        output = torch.empty_like(x)
        for frame, result in zip(x.split(1, 2), output.split(1, 2), strict=True):
            result.copy_(framewise(layers, frame))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        of_input = torch.empty_like(x)
        for frame, cotangent, result in zip(*(t.split(1, 2) for t in (x, gradient, of_input)), strict=True):
            frame = frame.detach().requires_grad_()
            with torch.enable_grad():
                again = framewise(ctx.layers, frame)
            result.copy_(torch.autograd.grad(again, frame, cotangent)[0])
        return None, of_input


def _is_autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _convolution(
    func: Callable[..., Tensor],
    input_gradient: Callable[..., Tensor],
    round_freely: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trained or not x.requires_grad or isinstance(padding, str) or _is_autocast(x):
        return func(x, weight, bias, stride, padding, dilation, groups)
    func = onednn.conv3d if round_freely and func is torch.conv3d else func
    return _FrozenConvolution.apply(func, input_gradient, x, weight, bias, stride, padding, dilation, groups)


class _FrozenConvolution(torch.autograd.Function):
    """A convolution that keeps its weight, which is there anyhow, and of its input the shape alone."""

    @staticmethod
    def forward(
        ctx: Any,
        func: Callable[..., Tensor],
        input_gradient: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *settings: Any,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.input_gradient, ctx.shape, ctx.settings = input_gradient, x.shape, settings
        return func(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        of_input = ctx.input_gradient(ctx.shape, weight, gradient, *ctx.settings)
        return (None, None, of_input, *(None,) * 6)


_CONVOLUTIONS: dict[Any, Callable[..., Tensor]] = {torch.conv2d: conv2d_input, torch.conv3d: onednn.conv3d_input}

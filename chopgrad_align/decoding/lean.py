"""Layers that keep less for their backward pass, put in place of the usual ones while a graph is recorded.

Plain autograd keeps the input of every convolution, because a trained weight would need it; a frozen one does not. And
of a normalisation with its activation it keeps several tensors, some upcast to float32; all of them follow from the
input, which is there anyhow. Gradients are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv3d_input
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary
from torch.utils.checkpoint import checkpoint


class Lean(TorchFunctionMode):
    """Within the context, frozen convolutions keep no input, and `framewise` keeps its input only.

    Convolutions under autocast are left alone: it casts inside them.

    Args:
        stable: Whether the layers leave rounding small. Then the run that is recorded may round otherwise than the one
            without a graph, where that is faster.
    """

    def __init__(self, stable: bool = False) -> None:
        super().__init__()
        self.stable = stable

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is framewise:
            return _framewise_recomputed(*args)
        if (input_gradient := _CONVOLUTIONS.get(func)) is not None:
            return _convolution(func, input_gradient, self.stable, *args, **kwargs)
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
        pulled = torch.empty_like(x)
        for frame, cotangent, result in zip(*(t.split(1, 2) for t in (x, gradient, pulled)), strict=True):
            frame = frame.detach().requires_grad_()
            with torch.enable_grad():
                again = framewise(ctx.layers, frame)
            result.copy_(torch.autograd.grad(again, frame, cotangent)[0])
        return None, pulled


def _is_autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _convolution(
    func: Callable[..., Tensor],
    input_gradient: Callable[..., Tensor],
    stable: bool,
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
    func = _conv3d if stable and func is torch.conv3d else func
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
        stride, padding, dilation, groups = ctx.settings
        if _onednn_is_faster(gradient) and _triple(stride) == _triple(dilation) == (1, 1, 1) and groups == 1:
            # Of stride 1: the convolution with the flipped kernel, padded by what the other one was not.
            flipped = weight.flip(2, 3, 4).transpose(0, 1).contiguous()
            rest = [size - 1 - pad for size, pad in zip(weight.shape[2:], _triple(padding), strict=True)]
            pulled = _onednn(gradient, flipped, None, rest, (1, 1, 1), (1, 1, 1), 1)
        else:
            pulled = ctx.input_gradient(ctx.shape, weight, gradient, *ctx.settings)
        return (None, None, pulled, *(None,) * 6)


_onednn = torch.ops.aten.mkldnn_convolution


def _conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    if _onednn_is_faster(x):
        return _onednn(x, weight, bias, *map(_triple, (padding, stride, dilation)), groups)
    return torch.conv3d(x, weight, bias, stride, padding, dilation, groups)


def _onednn_is_faster(x: Tensor) -> bool:
    """Whether to ask for oneDNN by name.

    Of one sample torch convolves on a path several times slower unless channels, frames and height multiply to more
    than this (`ConvParams::use_mkldnn` in aten's Convolution.cpp); a decoder's group is often smaller.
    """
    plain = type(x) is Tensor and x.ndim == 5 and x.device.type == "cpu" and x.dtype == torch.float32
    return plain and len(x) == 1 and x[0, :, :, :, 0].numel() <= 20480 and bool(torch.backends.mkldnn.enabled)


def _triple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) * 3 if isinstance(value, int) else tuple(value)


_CONVOLUTIONS: dict[Any, Callable[..., Tensor]] = {torch.conv2d: conv2d_input, torch.conv3d: conv3d_input}

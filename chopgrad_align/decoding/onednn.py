"""The convolution of small float32 tensors by oneDNN, on the CPU, where torch would choose a slower path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import grad

_LARGEST = 20480
"""Channels x frames x height of one sample, up to which torch does not choose oneDNN by itself."""


def conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """`torch.conv3d` with numbers as padding, by oneDNN where that is faster; the result may round otherwise."""
    if _is_faster(x):
        return _convolve(x, weight, bias, *map(_triple, (padding, stride, dilation)), groups)
    return torch.conv3d(x, weight, bias, stride, padding, dilation, groups)


def conv3d_input(
    shape: torch.Size, weight: Tensor, gradient: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """`torch.nn.grad.conv3d_input`: the gradient of a convolution's input, by oneDNN where that is faster."""
    if not (_is_faster(gradient) and _triple(stride) == _triple(dilation) == (1, 1, 1) and groups == 1):
        return grad.conv3d_input(shape, weight, gradient, stride, padding, dilation, groups)
    # With stride 1: the convolution with the flipped kernel, padded by what the other one was not.
    flipped = weight.flip(2, 3, 4).transpose(0, 1).contiguous()
    rest = [size - 1 - pad for size, pad in zip(weight.shape[2:], _triple(padding), strict=True)]
    return _convolve(gradient, flipped, None, rest, (1, 1, 1), (1, 1, 1), 1)


_convolve = torch.ops.aten.mkldnn_convolution


def _is_faster(x: Tensor) -> bool:
    """True for one sample that torch would convolve on a path several times slower.

    It takes oneDNN only if channels, frames and height multiply to more than `_LARGEST` (`ConvParams::use_mkldnn` in
    aten's Convolution.cpp); a decoder's group is often smaller.
    """
    plain = type(x) is Tensor and x.ndim == 5 and x.device.type == "cpu" and x.dtype == torch.float32
    return plain and len(x) == 1 and x[0, :, :, :, 0].numel() <= _LARGEST and bool(torch.backends.mkldnn.enabled)


def _triple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) * 3 if isinstance(value, int) else tuple(value)

"""How gradients are taken and compared."""

import torch
from torch import Tensor

ROUNDING = 2e-5
"""The relative error that float32 may leave in a gradient by sums in another order: twice the worst that was seen."""


def weighted(pixels: Tensor) -> Tensor:
    """A sum with random weights, always the same: each pixel moves it otherwise."""
    generator = torch.Generator().manual_seed(2)
    return (pixels * torch.randn(pixels.shape, generator=generator).to(pixels)).sum()


def gradient(output: Tensor, source: Tensor) -> Tensor:
    return torch.autograd.grad(output, source)[0]


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def assert_same(pixels: Tensor, expected: Tensor, latents: Tensor) -> None:
    """The same bits, and but for rounding the same gradient."""
    assert torch.equal(pixels, expected)
    assert_same_gradient(pixels, expected, latents)


def assert_same_gradient(pixels: Tensor, expected: Tensor, latents: Tensor, tolerance: float = ROUNDING) -> None:
    assert relative_error(gradient(weighted(pixels), latents), gradient(weighted(expected), latents)) < tolerance

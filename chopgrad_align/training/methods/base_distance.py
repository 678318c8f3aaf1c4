"""Distance of a denoiser's predictions to those of the untrained model, in the steps that carry gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ...decoding.reproducible_state import ReproducibleState


class BaseDistance:
    """The distance `(B,)`, whose gradient is exact: `1/N Σ_k mean (ε_θ(x_k) - ε_0(x_k))²`.

    The sum is over the N predictions with a graph of a rollout, of guidance's unconditional branch too, the mean over
    the elements of one. The untrained model takes one forward more for each, without a graph if the latents x_k have
    none; from the second gradient step on they have, and it runs once more and backward to them.

    Args:
        base: Context in which the denoiser is the untrained one.
        videos: B.
    """

    def __init__(self, base: Callable[[], AbstractContextManager[None]], videos: int) -> None:
        self._base, self._videos = base, videos
        self._distances: list[Tensor] = []

    def observe(
        self, forward: Callable[..., Any], denoiser: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Compare what the denoiser returned; see `sampling.gradient_steps.Observe`."""
        leaves, structure = tree_flatten((args, kwargs))
        varying = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]

        def predict(*values: Tensor) -> Tensor:
            given = [*leaves]
            for i, value in zip(varying, values, strict=True):
                given[i] = value
            args, kwargs = tree_unflatten(given, structure)
            return tree_leaves(forward(denoiser, *args, **kwargs))[0]

        predicted = tree_leaves(output)[0]
        expected = _Untrained.apply(predict, self._base, predicted.device, *(leaves[i] for i in varying))
        wide = torch.promote_types(predicted.dtype, torch.float32)
        error = (predicted.to(wide) - expected.to(wide)).square().flatten(1).mean(1)
        self._distances.append(error.unflatten(0, (-1, self._videos)).mean(0))

    def take(self) -> Tensor | None:
        """The mean over the calls since it was last taken; None if there were none."""
        distances, self._distances = self._distances, []
        return torch.stack(distances).mean(0) if distances else None


class _Untrained(torch.autograd.Function):
    """A prediction of the untrained model, which is run again in the backward pass.

    All of that pass is within the context of the untrained weights, so that blocks that are recomputed in turn see
    them too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        predict: Callable[..., Tensor],
        base: Callable[[], AbstractContextManager[None]],
        device: torch.device,
        *latents: Tensor,
    ) -> Tensor:
        ctx.predict, ctx.base, ctx.state = predict, base, ReproducibleState(device)
        ctx.save_for_backward(*latents)
        with base():
            return predict(*latents)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        latents = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad(), ctx.state.restore(), ctx.base():
            gradients = torch.autograd.grad(ctx.predict(*latents), latents, cotangent, allow_unused=True)
        return None, None, None, *gradients

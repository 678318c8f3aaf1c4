"""A call of the denoiser that runs again in the backward pass, instead of keeping its activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..common.errors import UsageError
from ..common.versions import versions


def recomputed(forward: Callable[..., Any], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return `forward(module, *args, **kwargs)`, which is run again with the same random and autocast state.

    Raises:
        UsageError: In the backward pass: the module's weights or its mode have changed since.
    """

    def run(*values: Any) -> Any:
        named = dict(zip(kwargs, values[len(args) :], strict=True))
        return forward(module, *values[: len(args)], **named)

    def check(gradient: Tensor) -> None:
        if versions(module) != seen:
            raise UsageError(
                f"the weights of {type(module).__name__} changed, or its mode, between rollout and backward: the "
                "gradient would be wrong: call backward before the optimizer's step"
            )

    seen = versions(module)
    # By position: checkpoint keeps the random state of those devices only that it finds among positional arguments.
    result = checkpoint(run, *args, *kwargs.values(), use_reentrant=False, preserve_rng_state=True)
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            # In a hook of its own: an error inside the recomputation leaves a graph that crashes Python as it exits.
            leaf.register_hook(check)
    return result

"""A call of the denoiser that runs again in the backward pass, instead of keeping its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..common.errors import UsageError
from ..common.versions import versions


def recomputed(
    forward: Callable[..., Any],
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    prepare: Callable[[], None] = lambda: None,
) -> Any:
    """Return `forward(module, *args, **kwargs)`, which is run again with the same random and autocast state.

    `prepare` is called before each run. The module's attention processors, too, are those of this moment.

    Raises:
        UsageError: In the backward pass: the module's weights or its mode have changed since.
    """

    def run(*values: Any) -> Any:
        named = dict(zip(kwargs, values[len(args) :], strict=True))
        prepare()
        with attending_by(module, processors):
            return forward(module, *values[: len(args)], **named)

    processors = getattr(module, "attn_processors", {})
    # By position: checkpoint keeps the random state of those devices only that it finds among positional arguments.
    return guarded(checkpoint(run, *args, *kwargs.values(), use_reentrant=False, preserve_rng_state=True), module)


def guarded(result: Any, module: nn.Module) -> Any:
    """Return what a module returned; in the backward pass it must have the weights and the mode that it has now.

    Raises:
        UsageError: In the backward pass: it has not.
    """

    def check(gradient: Tensor) -> None:
        if versions(module) != seen:
            raise UsageError(
                f"the weights of {type(module).__name__} changed, or its mode, between rollout and backward: the "
                "gradient would be wrong: call backward before the optimizer's step"
            )

    seen = versions(module)
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            # In a hook of its own: an error inside the recomputation leaves a graph that crashes Python as it exits.
            leaf.register_hook(check)
    return result


@contextmanager
def attending_by(module: Any, processors: dict[str, Any]) -> Iterator[None]:
    """Within the context a model has these attention processors; some pipelines change them for their call (PAG)."""
    now = getattr(module, "attn_processors", {})
    if all(now[name] is processor for name, processor in processors.items()):
        yield
        return
    module.set_attn_processor({**processors})
    try:
        yield
    finally:
        module.set_attn_processor({**now})

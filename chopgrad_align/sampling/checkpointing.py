"""Gradient checkpointing of a denoiser: which of its activations are kept for the backward pass, and where.

The blocks are those that the denoiser itself hands to its checkpointing function (`enable_gradient_checkpointing` of
diffusers), which is replaced for the time of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from ..common.arguments import whole_number
from ..common.errors import UsageError
from ..decoding.offload import Device, Host, Place
from .recomputation import attending_by, guarded, recomputed

_NAMED = ("call", "block", "nested", "none")


@dataclass(frozen=True)
class Checkpointing:
    """What is kept of a denoiser's calls with a graph until the backward pass, and what runs again in it.

    F is a forward pass of the denoiser, B a backward pass. The gradient is the same.

    Args:
        checkpoint: `"call"` keeps the arguments of each call, which runs again, 2F + B: the activations of one call at
            a time. `"block"` keeps the input of each block, which runs again, 2F + B: of all calls, and while the
            video is decoded and scored as well. `"nested"` keeps the arguments of each call, which runs again, and each
            of its blocks once more, 3F + B: the block inputs of one call at a time. `"none"` keeps everything, F + B. A
            number n is `"block"` for one of n blocks, `"none"` for the others, (1 + 1/n)F + B. A denoiser whose own
            `enable_gradient_checkpointing()` was called checkpoints all blocks in any case, so that `"call"` is
            `"nested"` there.
        inputs: Where block inputs wait: beside the model, or in host memory, from which they are fetched a block ahead.
    """

    checkpoint: Literal["call", "block", "nested", "none"] | int = "call"
    inputs: Literal["device", "host"] = "device"

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoint, str):
            whole_number("Checkpointing: checkpoint", self.checkpoint)
        elif self.checkpoint not in _NAMED:
            expected = ", ".join(map(repr, _NAMED))
            raise UsageError(f"Checkpointing(checkpoint={self.checkpoint!r}): expected one of {expected}, or a number")
        if self.inputs not in ("device", "host"):
            raise UsageError(f"Checkpointing(inputs={self.inputs!r}): expected 'device' or 'host'")
        if self.inputs == "host" and self.block_stride is None:
            raise UsageError(
                f"Checkpointing(checkpoint={self.checkpoint!r}, inputs='host'): no block is checkpointed whose input "
                "could wait there; use checkpoint='block' or 'nested'"
            )

    @property
    def block_stride(self) -> int | None:
        """The number of blocks of which one is checkpointed; None if this policy checkpoints none."""
        return {"call": None, "none": None, "block": 1, "nested": 1}.get(self.checkpoint, self.checkpoint)  # type: ignore[call-overload, no-any-return]

    def expect_blocks(self, denoiser: nn.Module) -> None:
        """Raise a UsageError if the policy checkpoints blocks, and the denoiser does not know which."""
        if self.block_stride is not None and not _has_blocks(denoiser):
            raise UsageError(
                f"checkpoint={self.checkpoint!r}: {type(denoiser).__name__} has no gradient checkpointing of its "
                "blocks; use 'call' or 'none'"
            )

    def call(
        self,
        forward: Callable[..., Any],
        denoiser: nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
        prepare: Callable[[], None] = lambda: None,
    ) -> Any:
        """Return `forward(denoiser, *args, **kwargs)` with a graph that keeps what the policy says.

        A module without blocks, such as a controlnet, runs again as a whole where the policy asks for blocks.

        Args:
            forward: Of the denoiser; runs again as it ran first, see `recomputed`.
            denoiser: Whose weights and mode are the same in the backward pass.
            args: Positional arguments.
            kwargs: Named ones.
            prepare: Is called before what runs again.

        Raises:
            UsageError: In the backward pass: the module's weights or its mode have changed since.
        """
        by_block = self.block_stride is not None and _has_blocks(denoiser)
        if self.checkpoint == "none" or (by_block and self.checkpoint != "nested"):
            return guarded(self.forward(forward, prepare)(denoiser, *args, **kwargs), denoiser)
        return recomputed(self.forward(forward, prepare), denoiser, args, kwargs, prepare)

    def forward(self, forward: Callable[..., Any], prepare: Callable[[], None] = lambda: None) -> Callable[..., Any]:
        """The function with blocks checkpointed as the policy says."""
        stride = self.block_stride
        if stride is None:
            return forward

        def run(denoiser: nn.Module, *args: Any, **kwargs: Any) -> Any:
            device = next(denoiser.parameters()).device
            blocks = _Blocks(denoiser, stride, Host(device) if self.inputs == "host" else Device(), prepare)
            with blocks.checkpointed():
                return forward(denoiser, *args, **kwargs)

        return run


def _has_blocks(denoiser: nn.Module) -> bool:
    return bool(getattr(denoiser, "_supports_gradient_checkpointing", False))


class _Blocks:
    """The blocks of one call of a denoiser, of which some keep their input alone, and run again."""

    def __init__(self, denoiser: nn.Module, stride: int, place: Place, prepare: Callable[[], None]) -> None:
        self._denoiser, self._stride, self._place, self._prepare = denoiser, stride, place, prepare
        self._processors = getattr(denoiser, "attn_processors", {})
        self._count = 0
        self._shared: list[ref[Tensor]] = []  # what the last block was given
        self._before: Any = None  # its input, put away

    @contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Within the context the denoiser checkpoints its blocks by `run`."""
        parts = [part for part in self._denoiser.modules() if hasattr(part, "gradient_checkpointing")]
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(mock.patch.object(part, "gradient_checkpointing", True))
                stack.enter_context(mock.patch.object(part, "_gradient_checkpointing_func", self.run, create=True))
            yield
        self._place.synchronize()

    def run(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return `block(*args, **kwargs)`, which runs again in the backward pass if it is its turn."""
        self._count += 1
        if self._count % self._stride:
            return block(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        # What all blocks are given, such as text and positions, stays where it is.
        new = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not self._is_shared(leaf)]
        self._shared = [ref(tensor) for tensor in tensors]
        stored, before = self._place.offload([leaves[index] for index in new]), self._before
        self._before = stored
        kept = [None if index in new else leaf for index, leaf in enumerate(leaves)]
        graded = [leaf.requires_grad if isinstance(leaf, Tensor) else None for leaf in leaves]
        first, state = [leaves], (self._denoiser, self._processors, self._place, self._prepare)
        del leaves, args, kwargs

        def once_or_again(_: Tensor) -> Any:
            if first:
                given, named = tree_unflatten(first.pop(), structure)
                return block(*given, **named)
            denoiser, processors, place, prepare = state
            values = dict(zip(new, place.load(stored), strict=True))
            place.prefetch(before)
            found = [
                leaf if grad is None else values.get(index, leaf).detach().requires_grad_(grad)
                for index, (leaf, grad) in enumerate(zip(kept, graded, strict=True))
            ]
            given, named = tree_unflatten(found, structure)
            prepare()
            with attending_by(denoiser, processors):
                return block(*given, **named)

        # A tensor by position: checkpoint keeps the random state of those devices only that it finds there.
        return checkpoint(once_or_again, torch.empty(0, device=tensors[0].device), use_reentrant=False)

    def _is_shared(self, tensor: Tensor) -> bool:
        return any(other() is tensor for other in self._shared)

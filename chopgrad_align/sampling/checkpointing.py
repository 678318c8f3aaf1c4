"""Gradient checkpointing of a denoiser: which of its activations are kept for the backward pass, and where.

The blocks are those that the denoiser itself hands to its checkpointing function (`enable_gradient_checkpointing` of
diffusers), which is replaced for the time of a call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock
from weakref import ref

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from ..common.arguments import whole_number
from ..common.errors import UsageError
from ..decoding.offload import Host
from .recomputation import attending_by, guarded, recomputed

_NAMED = ("call", "block", "nested", "none")


@dataclass(frozen=True)
class Checkpointing:
    """Activation checkpointing of a denoiser: what its calls keep until the backward pass, and what runs again in it.

    F is a forward pass of the denoiser, B a backward pass. The gradient is the same.

    Args:
        checkpoint: `"call"` keeps the arguments of each call, which runs again, 2F + B: the activations of one call at
            a time. `"block"` keeps the input of each block, which runs again, 2F + B: of all calls, and while the
            video is decoded and scored as well. `"nested"` keeps the arguments of each call, which runs again, and each
            of its blocks once more, 3F + B: the block inputs of one call at a time. `"none"` keeps everything, F + B. A
            number n is `"block"` for one of n blocks, `"none"` for the others, (1 + 1/n)F + B. A denoiser whose own
            `enable_gradient_checkpointing()` was called checkpoints all blocks in any case, so that `"call"` is
            `"nested"` there.
        inputs: Where block inputs wait, with `"block"` and n: beside the model, or in host memory, from which they are
            fetched a block ahead.
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
        if self.inputs == "host" and self.checkpoint in ("call", "nested", "none"):
            raise UsageError(
                f"Checkpointing(checkpoint={self.checkpoint!r}, inputs='host'): no input of a block is kept that could "
                "wait there; use checkpoint='block'"
            )

    @property
    def block_stride(self) -> int | None:
        """The number of blocks of which one is checkpointed; None if this policy checkpoints none."""
        if isinstance(self.checkpoint, int):
            return self.checkpoint
        return 1 if self.checkpoint in ("block", "nested") else None

    def expect_blocks(self, denoiser: nn.Module) -> None:
        """Raise a UsageError if the policy checkpoints blocks, and the denoiser does not know which."""
        if self.block_stride is not None and not getattr(denoiser, "_supports_gradient_checkpointing", False):
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

        Args:
            forward: Of the denoiser; runs again as it ran first, see `recomputed`.
            denoiser: Whose weights and mode are the same in the backward pass.
            args: Positional arguments.
            kwargs: Named ones.
            prepare: Is called before what runs again.

        Raises:
            UsageError: In the backward pass: the module's weights or its mode have changed since.
        """
        by_block = self.forward(forward, prepare)
        if self.checkpoint in ("call", "nested"):
            return recomputed(by_block, denoiser, args, kwargs, prepare)
        return guarded(by_block(denoiser, *args, **kwargs), denoiser)

    def forward(self, forward: Callable[..., Any], prepare: Callable[[], None] = lambda: None) -> Callable[..., Any]:
        """The function with blocks checkpointed as the policy says."""
        stride = self.block_stride
        if stride is None:
            return forward

        def run(denoiser: nn.Module, *args: Any, **kwargs: Any) -> Any:
            host = Host(next(denoiser.parameters()).device) if self.inputs == "host" else None
            blocks = _Blocks(denoiser, stride, host, prepare)
            with blocks.checkpointed():
                return forward(denoiser, *args, **kwargs)

        return run


class _Blocks:
    """The blocks of one call of a denoiser, of which some keep their input alone, and run again.

    Args:
        denoiser: That is called.
        stride: The number of blocks of which one runs again.
        host: Where the inputs of these wait; beside the model if there is none.
        prepare: Is called before a block runs again.
    """

    def __init__(self, denoiser: nn.Module, stride: int, host: Host | None, prepare: Callable[[], None]) -> None:
        self._denoiser, self._stride, self._host, self._prepare = denoiser, stride, host, prepare
        self._processors = getattr(denoiser, "attn_processors", {})
        self._count = 0
        self._given: list[ref[Tensor]] = []  # to the last block
        self._before: Any = None  # the input of the block before that waits on the host

    @contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Within the context the denoiser checkpoints its blocks by `run`."""
        parts = [part for part in self._denoiser.modules() if hasattr(part, "gradient_checkpointing")]
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(mock.patch.object(part, "gradient_checkpointing", True))
                stack.enter_context(mock.patch.object(part, "_gradient_checkpointing_func", self.run, create=True))
            yield
        if self._host is not None:
            self._host.synchronize()

    def run(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return `block(*args, **kwargs)`, which runs again in the backward pass if it is its turn."""
        self._count += 1
        if self._count % self._stride:
            return block(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        fill_in = list if self._host is None else self._put_away(leaves, self._host)
        runs, denoiser, processors, prepare = itertools.count(), self._denoiser, self._processors, self._prepare
        del args, kwargs

        def run(*values: Any) -> Any:
            given, named = tree_unflatten(fill_in(values), structure)
            if next(runs) == 0:
                return block(*given, **named)
            prepare()
            with attending_by(denoiser, processors):
                return block(*given, **named)

        return checkpoint(run, *leaves, use_reentrant=False)

    def _put_away(self, leaves: list[Any], host: Host) -> Callable[[Sequence[Any]], list[Any]]:
        """Move a block's input to the host, and leave empty tensors in its place; returns what fills it in again."""
        # Inputs that all blocks share, such as text and positions, stay where they are, but for the first block.
        new = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not self._was_given(leaf)]
        self._given = [ref(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        first: list[Tensor] | None = [leaves[i] for i in new]
        graded = [leaves[i].requires_grad for i in new]
        before, self._before = self._before, host.offload(first)
        stored = self._before
        for i in new:
            leaves[i] = leaves[i].new_empty(0)  # its device says whose random state is kept

        def fill_in(values: Sequence[Any]) -> list[Any]:
            nonlocal first
            found, first = first, None
            if found is None:
                found = [tensor.requires_grad_(grad) for tensor, grad in zip(host.load(stored), graded, strict=True)]
                host.prefetch(before)
            by_place = dict(zip(new, found, strict=True))
            return [by_place.get(i, value) for i, value in enumerate(values)]

        return fill_in

    def _was_given(self, tensor: Tensor) -> bool:
        """True if the last block was given it too."""
        return any(other() is tensor for other in self._given)

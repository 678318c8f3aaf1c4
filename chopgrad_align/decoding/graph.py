"""The vector-Jacobian product of one block: run it with a graph, whole or a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from .decoders.base import Block, Cache, Hidden, SpatiallyLocalBlock

Cotangents = list[Tensor | None]
"""One cotangent per tensor leaf; `None` if there is none. `[]` for none at all."""

Recording = Callable[[], AbstractContextManager[Any]]
"""A function that makes the context in which a block is run with a graph."""


@dataclass(frozen=True)
class Gradients:
    """The gradients of a block's hidden state, of its cache, and of the weights."""

    hidden: Cotangents
    cache: Cotangents
    weights: Cotangents


class Graph:
    """A block that was run with a graph, which ends where the block does.

    Args:
        block: The block to run.
        hidden, cache: Its arguments, detached here.
        recording: The context for the run.
        through_hidden, through_cache: True if their gradients are asked for.
    """

    def __init__(
        self,
        block: Block,
        hidden: Hidden,
        cache: Cache,
        recording: Recording = nullcontext,
        through_hidden: bool = True,
        through_cache: bool = True,
    ) -> None:
        leaves, structure = tree_flatten(cache)
        self._hidden = [_leaf(tensor, through_hidden) for tensor in hidden]
        self._cache = [_leaf(leaf, through_cache) if isinstance(leaf, Tensor) else None for leaf in leaves]
        given = [leaf if tensor is None else tensor for leaf, tensor in zip(leaves, self._cache, strict=True)]
        with recording(), torch.enable_grad():
            self._output, self._after = block(tuple(self._hidden), tree_unflatten(given, structure))

    @property
    def output(self) -> Hidden:
        return tuple(tensor.detach() for tensor in self._output)

    @property
    def after(self) -> Cache:
        # Detached, because a cache that is kept must not keep this block's graph alive.
        return tree_map_only(Tensor, Tensor.detach, self._after)

    def vjp(
        self, output: Cotangents, after: Cotangents, weights: Sequence[Tensor], retain_graph: bool = False
    ) -> Gradients:
        """The gradients, given the cotangents of the output and of the cache after."""
        results = [*(self._output if output else ()), *(tree_leaves(self._after) if after else ())]
        roots = [(r, c) for r, c in zip(results, [*output, *after], strict=True) if c is not None and r.requires_grad]
        inputs = [tensor for tensor in (*self._hidden, *self._cache) if tensor is not None and tensor.requires_grad]
        if not roots or not (inputs or weights):
            return Gradients([], [], [])
        outputs, cotangents = zip(*roots, strict=True)
        grads = torch.autograd.grad(
            outputs,
            [*inputs, *weights],
            [c.to(o.dtype) for o, c in zip(outputs, cotangents, strict=True)],
            retain_graph=retain_graph,
            allow_unused=True,
        )
        by_input = dict(zip(map(id, inputs), grads, strict=False))
        hidden, cache = ([by_input.get(id(tensor)) for tensor in tensors] for tensors in (self._hidden, self._cache))
        return Gradients(hidden, cache, list(grads[len(inputs) :]))


class RowGraphs:
    """A block that is local in space, run with a graph on a few rows after the other when its `vjp` is taken.

    Rows at the edge of a piece see zeros where their neighbours are; these lie in the halo, whose cotangents are zero,
    so that the gradient is exact.

    Args:
        rows: The largest number of rows of the output that have a graph at a time, if the block's scale allows it.
        prefetch: Called once, half-way.
    """

    def __init__(
        self,
        block: SpatiallyLocalBlock,
        rows: int,
        hidden: Hidden,
        cache: Cache,
        recording: Recording,
        through_cache: bool,
        prefetch: Callable[[], None],
    ) -> None:
        self._block, self._x, self._cache = block, hidden[0], cache
        self._recording, self._through_cache, self._prefetch = recording, through_cache, prefetch
        self._step = max(1, rows // block.scale)

    def vjp(
        self, output: Cotangents, after: Cotangents, weights: Sequence[Tensor], retain_graph: bool = False
    ) -> Gradients:
        """The gradients, as `Graph.vjp` returns them; each piece runs again whether or not its graph is retained."""
        if all(cotangent is None for cotangent in (*output, *after)):
            return Gradients([], [], [])
        height = self._x.shape[-2]
        total_x = torch.zeros_like(self._x)
        total_cache = [
            torch.zeros_like(leaf) if isinstance(leaf, Tensor) and self._through_cache else None
            for leaf in tree_leaves(self._cache)
        ]
        total_weights: Cotangents = [None] * len(weights)
        for start in range(0, height, self._step):
            inner = slice(start, min(start + self._step, height))
            outer = slice(max(0, inner.start - self._block.halo), min(height, inner.stop + self._block.halo))
            part = self._vjp_of_rows(inner, outer, output, after, weights)
            for total, grad in zip([total_x, *total_cache], [*part.hidden, *part.cache], strict=False):
                if total is not None and grad is not None:
                    _rows(total, outer).add_(grad)
            total_weights = [plus(a, b) for a, b in zip(total_weights, part.weights, strict=True)]
            if inner.start <= height // 2 < inner.stop:
                self._prefetch()
        return Gradients([total_x, *output[1:]], total_cache, total_weights)

    def _vjp_of_rows(
        self, inner: slice, outer: slice, output: Cotangents, after: Cotangents, weights: Sequence[Tensor]
    ) -> Gradients:
        """The gradients of the outer rows, given the cotangents of the inner ones."""
        scale = self._block.scale
        x, cache = _rows((self._x, self._cache), outer)
        cropped = _cropped(self._block, slice(inner.start - outer.start, inner.stop - outer.start))
        graph = Graph(cropped, (x,), cache, self._recording, through_cache=self._through_cache)
        of_output = _rows(output[:1] or [None], slice(inner.start * scale, inner.stop * scale))
        return graph.vjp(of_output, _rows(after, inner), weights)


def _cropped(block: SpatiallyLocalBlock, inner: slice) -> Block:
    """The block without the halo of its output and of its cache."""
    scaled = slice(inner.start * block.scale, inner.stop * block.scale)

    def run(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
        (output,), cache = block(hidden, cache)
        return (_rows(output, scaled),), _rows(cache, inner)

    return run


def _rows(values: Any, rows: slice) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor[..., rows, :], values)


def _leaf(tensor: Tensor, needs_gradient: bool) -> Tensor:
    # Detached, because the graph of a block must end where the block does.
    tensor = tensor.detach()
    return tensor.requires_grad_(needs_gradient) if tensor.is_floating_point() else tensor


def plus(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Sum of two gradients, where `None` means zero."""
    return part if total is None else total if part is None else total + part

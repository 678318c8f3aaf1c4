"""One block with a graph: run it, and pull cotangents back through it; whole, or a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .decoders.base import Block, Cache, Hidden, Local

Cotangents = list[Tensor | None]
"""One a leaf of what they belong to; `None` where there is no tensor or no gradient. `[]` for none at all."""


Recording = Callable[[], AbstractContextManager[Any]]
"""Makes the context in which a block is run with a graph."""


@dataclass(frozen=True)
class Pulled:
    """The gradient of a block: of its hidden state, of its cache, and of the weights."""

    hidden: Cotangents
    cache: Cotangents
    weights: Cotangents


class Graph:
    """A block that was run with a graph, which ends where the block does.

    Args:
        block: What is run.
        hidden, cache: What it is given; detached here.
        recording: The context for the run.
        through_hidden, through_cache: Whether a gradient is asked of them.
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
        return tree_map_only(Tensor, Tensor.detach, self._after)

    def pull(self, output: Cotangents, after: Cotangents, weights: Sequence[Tensor], again: bool = False) -> Pulled:
        """The gradient, given the cotangents of the output and of the cache after; `again` if there will be more."""
        results = [*(self._output if output else ()), *(tree_flatten(self._after)[0] if after else ())]
        roots = [(r, c) for r, c in zip(results, [*output, *after], strict=True) if c is not None and r.requires_grad]
        inputs = [tensor for tensor in (*self._hidden, *self._cache) if tensor is not None and tensor.requires_grad]
        if not roots or not (inputs or weights):
            return Pulled([], [], [])
        outputs, cotangents = zip(*roots, strict=True)
        grads = torch.autograd.grad(
            outputs,
            [*inputs, *weights],
            [c.to(o.dtype) for o, c in zip(outputs, cotangents, strict=True)],
            retain_graph=again,
            allow_unused=True,
        )
        of = dict(zip(map(id, inputs), grads, strict=False))
        hidden, cache = ([of.get(id(tensor)) for tensor in tensors] for tensors in (self._hidden, self._cache))
        return Pulled(hidden, cache, list(grads[len(inputs) :]))


class RowGraphs:
    """A block that is local in space, run with a graph on a few rows after the other when it is pulled through.

    Rows at the edge of a piece see zeros where their neighbours are; these lie in the halo, whose cotangents are zero,
    so that the gradient is exact.
    """

    def __init__(
        self,
        block: Local,
        hidden: Hidden,
        cache: Cache,
        recording: Recording,
        through_cache: bool,
        rows: int,
        meanwhile: Callable[[], None],
    ) -> None:
        self._block, self._hidden, self._cache = block, hidden, cache
        self._recording, self._through_cache, self._meanwhile = recording, through_cache, meanwhile
        self._step = max(1, rows // block.scale)

    def pull(self, output: Cotangents, after: Cotangents, weights: Sequence[Tensor], again: bool = False) -> Pulled:
        block, (x, *_) = self._block, self._hidden
        if not any(cotangent is not None for cotangent in (*output, *after)):
            return Pulled([], [], [])
        leaves = tree_flatten(self._cache)[0]
        wants = [isinstance(leaf, Tensor) and self._through_cache for leaf in leaves]
        total_x = torch.zeros_like(x)
        total_cache = [torch.zeros_like(leaf) if w else None for leaf, w in zip(leaves, wants, strict=True)]
        total_weights: Cotangents = [None] * len(weights)
        own = output[0] if output else None
        for start in range(0, x.shape[-2], self._step):
            stop = min(start + self._step, x.shape[-2])
            first, last = max(0, start - block.halo), min(x.shape[-2], stop + block.halo)
            inner = slice(start - first, stop - first)
            given = _rows((x, self._cache), slice(first, last))
            piece = Graph(
                _cropped(block, inner), given[:1], given[1], self._recording, through_cache=self._through_cache
            )
            scaled = slice(start * block.scale, stop * block.scale)
            pulled = piece.pull([_rows(own, scaled)], _rows(after, slice(start, stop)), weights)
            for total, part in zip([total_x, *total_cache], [*pulled.hidden, *pulled.cache], strict=False):
                if total is not None and part is not None:
                    _rows(total, slice(first, last)).add_(part)
            total_weights = [plus(a, b) for a, b in zip(total_weights, pulled.weights, strict=True)]
            if start <= x.shape[-2] // 2 < stop:
                self._meanwhile()
        return Pulled([total_x, *output[1:]], total_cache, total_weights)


def _cropped(block: Local, inner: slice) -> Block:
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
    """The sum of two gradients, of which none is zero."""
    return part if total is None else total if part is None else total + part

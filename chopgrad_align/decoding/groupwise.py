r"""The gradient of a recurrence over frame groups, with the graph of one group, or of one block, alive at a time.

With $g_i = \partial L / \partial x_i$, full backpropagation through time is

$$ (\partial L / \partial z_i, \lambda_i) = J_f(z_i, c_i)^\top (g_i, \lambda_{i+1}), \qquad \lambda_G = 0, $$

from the last group to the first. Each line needs the graph of one group only, if $f$ is run again from a stored
$c_i$. `Exact` does that. `Truncated(D)` (ChopGrad, arXiv 2603.17812) keeps a cotangent $\lambda^{(i)}$ apart for every
group $i$ of pixels that it started from, and drops it after D groups. A policy may scale $\lambda_i$ on its way from
group $i$ to the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.errors import UsageError
from ..common.versions import versions
from .binomial import first_state
from .decoders.base import Cache, Group, Hidden, SpatiallyLocalBlock, stateless
from .graph import Cotangents, Graph, RowGraphs, plus
from .memory_efficient_layers import MemoryEfficientLayers
from .recurrence import Caches, Recurrence
from .reproducible_state import ReproducibleState

if TYPE_CHECKING:
    from .backprop import Groupwise

CacheCotangents = list[Any]
"""The cotangents of `Caches`, put away: `Cotangents` for each block. An empty list for none at all."""

CotangentPair = tuple[Tensor | None, CacheCotangents]
"""The cotangents of a group's result and of the caches after it."""


def groupwise(recurrence: Recurrence, latents: Tensor, policy: Groupwise) -> Tensor:
    """The value of a recurrence, with its gradient by a policy."""
    weights = recurrence.weights
    recurrence = replace(recurrence, whole_groups=not policy.checkpoint)
    if not (torch.is_grad_enabled() and (latents.requires_grad or weights)):
        return recurrence.value(latents, policy.place(latents.device))
    gradient = GroupwiseGradient(recurrence, policy, latents.device)
    if gradient.independent and recurrence.group_loss is not None and not _in_float16(latents):
        # In float16 a cotangent would underflow that is taken before the loss is scaled.
        return _OnePass.apply(gradient, latents, *weights)
    return _Replayed.apply(gradient, latents, *weights)


class GroupwiseGradient:
    """The gradient of one decoding.

    Attributes:
        independent: No cotangent crosses groups: the backward pass may go forward in time, and needs no stored caches.
        states: The random and autocast state before each group.
    """

    def __init__(self, recurrence: Recurrence, policy: Groupwise, device: torch.device) -> None:
        self.recurrence, self.policy, self.weights = recurrence, policy, recurrence.weights
        self.place = policy.place(device)
        self.distance = policy.truncation_distance()
        self.independent = not recurrence.decoder.recurrent or self.distance == 0
        self.states: list[ReproducibleState] = []

    def value(self, latents: Tensor, kept: dict[int, Caches]) -> Tensor:
        """The value; fills `kept` with the caches before those groups from which the backward pass will start."""
        wanted = {0} if self.independent else {*self.policy.kept_caches(len(self.recurrence.groups))}

        def before(index: int, caches: Caches) -> None:
            self.states.append(ReproducibleState(latents.device))
            if index in wanted:
                kept[index] = [*caches]

        return self.recurrence.value(latents, self.place, before)

    def add_to(
        self, total: GradientSum, latents: Tensor, kept: dict[int, Caches], cotangents: Sequence[Tensor | None]
    ) -> None:
        """Add the gradient, given the cotangent of each group's result; empties `kept`."""
        if self.independent:
            self._add_independent_groups(total, latents, cotangents)
        else:
            self._add_through_caches(total, latents, kept, cotangents)
        self.place.synchronize()

    def _add_independent_groups(self, total: GradientSum, latents: Tensor, cotangents: Sequence[Tensor | None]) -> None:
        recurrence = self.recurrence
        caches: Caches = []
        for index, (group, own) in enumerate(zip(recurrence.groups, cotangents, strict=True)):
            for part in recurrence.decoder.independent_frames(group):
                if own is not None:
                    start = group.frames.start
                    frames = recurrence.at(slice(part.frames.start - start, part.frames.stop - start))
                    pair: CotangentPair = (own[frames] if recurrence.group_loss is None else own), []
                    _, caches = self.add_group(total, index, part, latents, caches, pair)
                elif recurrence.decoder.recurrent:
                    caches = self._advanced(index, latents, caches)

    def add_group(
        self,
        total: GradientSum,
        index: int,
        group: Group,
        latents: Tensor,
        caches: Caches,
        pair: CotangentPair,
        first_run: bool = False,
    ) -> tuple[Tensor, Caches]:
        """Add the gradient of a group that is independent of the others; returns its result, and the caches after."""
        run = GroupRun(self, index, group, latents, caches, total.needs_latents, first_run=first_run)
        run.vjp([pair], total)
        return run.result, run.after

    def _add_through_caches(
        self, total: GradientSum, latents: Tensor, kept: dict[int, Caches], cotangents: Sequence[Tensor | None]
    ) -> None:
        pending: list[CacheCotangents] = []  # of the caches after the group at hand
        for index, caches in self._backwards(latents, kept):
            pairs = self._cotangent_pairs(cotangents[index], pending)
            factor = self.policy.cotangent_factor(index) if index > 0 else 0.0
            if any(own is not None or after for own, after in pairs):
                group = self.recurrence.groups[index]
                run = GroupRun(self, index, group, latents, caches, total.needs_latents, factor)
                pending = run.vjp(pairs, total)[: self.distance]
                del run  # before the next one is made
            else:
                pending = []

    def _cotangent_pairs(self, own: Tensor | None, pending: list[CacheCotangents]) -> list[CotangentPair]:
        if self.distance is None:  # all later groups share one, because a vector-Jacobian product is linear
            return [(own, pending[0] if pending else [])]
        # One for each later group of pixels, the nearest first: each has an end of the band of its own.
        return [(own, []), *((None, after) for after in pending)]

    def _backwards(self, latents: Tensor, kept: dict[int, Caches]) -> Iterator[tuple[int, Caches]]:
        """The groups from the last to the first, each with the caches before it, which the caller lets go."""
        limit, stop = self.policy.cache_sets, len(self.recurrence.groups)
        for start in sorted(kept, reverse=True):
            free = None if limit is None else limit - sum(index > 0 for index in kept)  # before group 0 there are none
            yield from self._segment_backwards(latents, start, stop, kept.pop(start), free)
            stop = start

    def _segment_backwards(
        self, latents: Tensor, start: int, stop: int, caches: Caches, free: int | None
    ) -> Iterator[tuple[int, Caches]]:
        """The groups `start` to `stop - 1` backwards, from the caches before the first, with room for `free` sets."""
        while stop - start > 1:
            middle = start + first_state(stop - start, free)
            ahead = [*caches]
            for index in range(start, middle):
                ahead = self._advanced(index, latents, ahead)
            yield from self._segment_backwards(latents, middle, stop, ahead, free and free - 1)
            stop = middle
        yield start, caches

    def _advanced(self, index: int, latents: Tensor, caches: Caches) -> Caches:
        """The caches after a group, which runs again for them alone; empties the list of those before it."""
        with self.states[index].restore(), torch.no_grad():
            of_group = self.recurrence.latents_of(latents, self.recurrence.groups[index])
            return self.recurrence.step(index, of_group, caches, self.place)[1]

    def efficient_layers(self) -> AbstractContextManager[Any]:
        """The context of a run whose pixels nobody sees."""
        if not self.policy.memory_efficient_layers:
            return nullcontext()
        return MemoryEfficientLayers(self.recurrence.decoder.insensitive_to_rounding)

    @contextmanager
    def recording(self, state: ReproducibleState | None) -> Iterator[None]:
        """The context of a run with a graph, in the state of the run before; `None` if that has not changed."""
        with state.restore() if state else nullcontext(), self.efficient_layers():
            yield


class GroupRun:
    """A group that runs again for its vector-Jacobian product, with the graph of one block alive at a time.

    It first runs forward without a graph and keeps what each block was given. Then `vjp` runs the blocks again, with a
    graph, from the last to the first. The last one has its graph from the start, so that it need not run twice.

    Args:
        caches: Those before the group. The list is emptied, so that each is let go when its block has been run last.
        factor: For the cotangents of the caches before the group, before they are carried on; 0 does not make them.
        first_run: The group has not run before: what it draws is drawn from the random state as it is.

    Attributes:
        result: The group's pixels or their loss, detached.
        after: The caches after the group, put away, if groups are independent.
    """

    def __init__(
        self,
        gradient: GroupwiseGradient,
        index: int,
        group: Group,
        latents: Tensor,
        caches: Caches,
        through_latents: bool,
        factor: float = 0.0,
        first_run: bool = False,
    ) -> None:
        self._gradient, self._place, self._weights = gradient, gradient.place, gradient.weights
        self._through_latents, self._factor = through_latents, factor
        recurrence = gradient.recurrence
        self._at = recurrence.at(group.latents)
        self._blocks = recurrence.blocks(index)
        self._caches = caches or [None] * len(self._blocks)
        self._given: list[Any] = []  # the hidden state before each block, put away
        self._states: list[ReproducibleState] = []  # before each block
        self._last: Graph | None = None  # of the last block
        self.after: Caches = []
        hidden: Hidden = (recurrence.latents_of(latents, group),)
        with gradient.states[index].restore(random=not first_run):
            for number in range(len(self._blocks)):
                hidden = self._forward(number, hidden)
            head = Graph(stateless(partial(recurrence.result, group)), hidden[:1], None)
        self._shortcuts = len(hidden) - 1
        self._head: Graph | None = head
        (self.result,) = head.output

    def vjp(self, pairs: Sequence[CotangentPair], total: GradientSum) -> list[CacheCotangents]:
        """Add the gradient of latents and weights to `total`, for each pair of cotangents, whose lists are emptied.

        Returns:
            For each pair the cotangents of the caches before the group, times the factor; `[]` if that is 0.
        """
        cotangents = self._vjp_of_head([own for own, _ in pairs], total)
        before: list[CacheCotangents] = [[] for _ in pairs]
        for number in reversed(range(len(self._blocks))):
            after = [pair_after.pop() if pair_after else None for _, pair_after in pairs]
            cotangents, of_caches = self._vjp_of_block(number, cotangents, after, total)
            if self._factor:
                for carried, stored in zip(before, of_caches, strict=True):
                    carried.insert(0, stored)
        for of_latents in cotangents:
            if of_latents:
                total.add_latents(self._at, of_latents[0])
        return before

    def _forward(self, number: int, hidden: Hidden) -> Hidden:
        """Run a block, and keep what it takes to run it again."""
        block, state = self._blocks[number], ReproducibleState(hidden[0].device)
        self._states.append(state)
        cache = self._place.load(self._caches[number])
        self._place.prefetch(*self._caches[number + 1 : number + 2])
        if number == len(self._blocks) - 1 and self._in_rows(number, hidden) is None:
            self._last = self._graph(number, hidden, cache, None)
            hidden, cache = self._last.output, self._last.after
            self._caches.pop()  # in the graph
        else:
            self._given.append(self._place.offload(hidden))
            with torch.no_grad(), self._gradient.efficient_layers():
                hidden, cache = block(hidden, cache)
        if self._gradient.independent:
            self.after.append(self._place.offload(cache))
        return hidden

    def _vjp_of_head(self, cotangents: Sequence[Tensor | None], total: GradientSum) -> list[Cotangents]:
        head, self._head = self._head, None  # let go with the end of this function
        assert head is not None
        found = []
        for own in cotangents:
            gradients = head.vjp([own], [], self._weights, retain_graph=True)
            total.add_weights(gradients.weights)
            # Shortcuts that the last block passed on lead nowhere.
            found.append(gradients.hidden and [*gradients.hidden, *[None] * self._shortcuts])
        return found

    def _vjp_of_block(
        self, number: int, cotangents: Sequence[Cotangents], after: Sequence[Any], total: GradientSum
    ) -> tuple[list[Cotangents], list[Any]]:
        """The cotangents of a block's hidden state, and those of its cache, put away, for each pair."""
        graph, self._last = self._last or self._run_again(number), None
        of_hidden, of_caches = [], []
        for turn, own in enumerate(cotangents):
            of_after = self._place.load(after[turn]) or []
            gradients = graph.vjp(own, of_after, self._weights, retain_graph=turn + 1 < len(cotangents))
            total.add_weights(gradients.weights)
            of_hidden.append(gradients.hidden)
            if self._factor:
                of_caches.append(self._place.offload(_scaled(gradients.cache, self._factor)))
            del of_after, gradients  # before the next pair's are loaded
        return of_hidden, of_caches

    def _run_again(self, number: int) -> Graph | RowGraphs:
        hidden, cache = self._place.load(self._given.pop()), self._place.load(self._caches.pop())
        next_ones = [*self._given[-1:], *self._caches[-1:]]
        prefetch = partial(self._swap_offloaded, next_ones)
        if (in_rows := self._in_rows(number, hidden)) is not None:
            recording = partial(self._gradient.recording, self._states[number])
            return RowGraphs(*in_rows, hidden, cache, recording, bool(self._factor), prefetch)
        graph = self._graph(number, hidden, cache, self._states[number])
        prefetch()
        return graph

    def _graph(self, number: int, hidden: Hidden, cache: Cache, state: ReproducibleState | None) -> Graph:
        through_hidden = self._through_latents or number > 0
        recording = partial(self._gradient.recording, state)
        return Graph(self._blocks[number], hidden, cache, recording, through_hidden, bool(self._factor))

    def _in_rows(self, number: int, hidden: Hidden) -> tuple[SpatiallyLocalBlock, int] | None:
        """The block and its rows at a time, if it is local in space and has more rows than these."""
        block, rows = self._blocks[number], self._gradient.policy.rows
        if rows is None or not isinstance(block, SpatiallyLocalBlock) or hidden[0].shape[-2] * block.scale <= rows:
            return None
        return block, rows

    def _swap_offloaded(self, next_ones: list[Any]) -> None:
        """In the first half of a block's work, what the one before left behind moves out; then the next one's moves in.

        Not both at a time: that would be what the peak is made of.
        """
        self._place.synchronize()
        self._place.prefetch(*next_ones)


class GradientSum:
    """Sums of what the groups contribute to the gradients of the latents and of the weights; `None` means zero."""

    def __init__(self, latents: Tensor, weights: Sequence[Tensor]) -> None:
        self.needs_latents = latents.requires_grad
        self.latents = torch.zeros_like(latents) if latents.requires_grad else None
        self.weights: list[Tensor | None] = [None] * len(weights)

    def add_latents(self, at: tuple[slice, ...], part: Tensor | None) -> None:
        if self.latents is not None and part is not None:
            self.latents[at] += part

    def add_weights(self, parts: Cotangents) -> None:
        if parts:
            self.weights = [plus(total, part) for total, part in zip(self.weights, parts, strict=True)]

    def times(self, scale: Tensor) -> list[Tensor | None]:
        return [None if grad is None else grad * scale.to(grad.dtype) for grad in (self.latents, *self.weights)]


class _Replayed(torch.autograd.Function):
    """The value without a graph; its groups run again, with one, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gradient: GroupwiseGradient, latents: Tensor, *weights: Tensor) -> Tensor:
        ctx.gradient, ctx.kept = gradient, {}
        ctx.save_for_backward(latents)
        ctx.versions = versions(gradient.recurrence.decoder.vae)
        return gradient.value(latents, ctx.kept)

    @staticmethod
    def backward(ctx: Any, of_value: Tensor) -> tuple[Tensor | None, ...]:
        gradient: GroupwiseGradient = ctx.gradient
        _refuse_second_derivative()
        if versions(gradient.recurrence.decoder.vae) != ctx.versions:
            raise UsageError(
                "decode: weights of the VAE changed, or its mode, between forward and backward pass, which runs "
                "the decoder again; call backward() before optimizer.step()"
            )
        (latents,) = ctx.saved_tensors
        latents = latents.detach().requires_grad_(ctx.needs_input_grad[1])
        total = GradientSum(latents, gradient.weights)
        # The caches are let go group by group, unless this graph is to be used again.
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        kept = {index: [*caches] for index, caches in ctx.kept.items()} if again else ctx.kept
        gradient.add_to(total, latents, kept, gradient.recurrence.cotangents(of_value))
        return None, total.latents, *total.weights


class _OnePass(torch.autograd.Function):
    """Losses and their gradient group by group in the forward pass; the backward pass only scales."""

    @staticmethod
    def forward(ctx: Any, gradient: GroupwiseGradient, latents: Tensor, *weights: Tensor) -> Tensor:
        ctx.total = GradientSum(latents, weights)
        losses: list[Tensor] = []
        caches: Caches = []
        one = torch.ones((), device=latents.device)
        for index, group in enumerate(gradient.recurrence.groups):
            gradient.states.append(ReproducibleState(latents.device))
            loss, caches = gradient.add_group(ctx.total, index, group, latents, caches, (one, []), first_run=True)
            losses.append(loss)
        gradient.place.synchronize()
        return gradient.recurrence.joined(losses)

    @staticmethod
    def backward(ctx: Any, of_value: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        return None, *ctx.total.times(of_value)


def _scaled(cotangents: Cotangents, factor: float) -> Cotangents:
    return cotangents if factor == 1 else [None if c is None else c * factor for c in cotangents]


def _in_float16(latents: Tensor) -> bool:
    kind = latents.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return torch.float16 in (latents.dtype, autocast)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # the engine enables it for create_graph=True only
        raise UsageError(
            "decode: second derivatives are not available; call backward() without create_graph=True, "
            "or decode with backprop=Full()"
        )

r"""The gradient through a recurrence over frame groups, with the graph of one group alive at a time.

A video decoder is the recurrence $(x_i, c_{i+1}) = f(z_i, c_i)$, $i = 0 \dots G-1$: latents in, pixels out, causal
caches carried along. With $g_i = \partial L / \partial x_i$, full backpropagation through time is

$$ (\partial L / \partial z_i, \lambda_i) = J_f(z_i, c_i)^\top (g_i, \lambda_{i+1}), \qquad \lambda_G = 0, $$

from the last group to the first. Each line needs the graph of one group only, if $f$ is run again from a stored
$c_i$. `Exact` does that. `Truncated(D)` (ChopGrad, arXiv 2603.17812) keeps a cotangent $\lambda^{(i)}$ apart for every
group $i$ of pixels that it started from, and drops it after D groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UsageError
from ..common.versions import versions
from .backprop import Backprop, Replay, Truncated
from .clamp import clamp_of
from .conditions import Conditions
from .decoders.base import Block, Cache, Decoder, Group, Hidden, Local, stateless
from .graph import Cotangents, Graph, RowGraphs, plus
from .lean import Lean
from .offload import Device, Host, Place

Caches = list[Cache]
"""The state of the recurrence between two groups, put away: one cache a unit. An empty list before the first group."""

CacheCotangents = list[Any]
"""The cotangents of `Caches`, put away: `Cotangents` for each unit. An empty list for none at all."""


class Recurrence:
    """One decoding: which groups, by which policy, and the conditions under which each first ran.

    Its result is the sum of `readout(group, pixels)` over the groups, or without a readout the pixels of the groups
    that are shown.
    """

    def __init__(
        self,
        decoder: Decoder,
        backprop: Backprop,
        groups: list[Group],
        shown: list[bool] | None = None,
        readout: Callable[[Group, Tensor], Tensor] | None = None,
    ) -> None:
        self.decoder, self.groups, self.readout = decoder, groups, readout
        self.shown = [True] * len(groups) if shown is None else shown
        self.weights: list[Tensor] = [p for p in decoder.vae.parameters() if p.requires_grad]
        self.conditions: list[Conditions] = []
        self.clamp = clamp_of(backprop)
        self.replay = backprop if isinstance(backprop, Replay) else None
        self.distance = backprop.distance if isinstance(backprop, Truncated) else None
        # No gradient crosses groups: the backward pass may go forward in time, and needs no stored caches.
        self.local = not decoder.recurrent or self.distance == 0
        self.place: Place = Device()

    def run(self, hidden: Tensor) -> Tensor:
        if self.replay is not None and self.replay.cache == "host":
            self.place = Host(hidden.device)
        needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or bool(self.weights))
        if self.replay is None or not needs_gradient:
            return self.forward(hidden)
        if self.local and self.readout is not None and not _in_float16(hidden):
            # In float16 a cotangent would underflow that is taken before the loss is scaled.
            return _Fused.apply(self, hidden, *self.weights)
        return _Replayed.apply(self, hidden, *self.weights)

    def units(self, index: int) -> Sequence[Block]:
        """What is run with a graph at a time, in order: each block of the group, or all of them as one."""
        blocks = self.decoder.blocks(index)
        return blocks if self.replay is not None and self.replay.checkpoint else [_in_turn(blocks)]

    def forward(self, hidden: Tensor, keep: dict[int, Caches] | None = None) -> Tensor:
        """All groups in order; fills `keep` with the caches before those groups from which `_replayed` will start."""
        stride = 1
        if self.local:
            stride = len(self.groups)
        elif self.replay is not None and self.replay.cache == "recompute":
            stride = math.ceil(math.sqrt(len(self.groups)))
        results = []
        caches: Caches = []
        for index, (group, shown) in enumerate(zip(self.groups, self.shown, strict=True)):
            if keep is not None:
                self.conditions.append(Conditions(hidden.device))
                if index % stride == 0:
                    keep[index] = caches
            if not shown and not self.decoder.recurrent:
                continue
            state, caches = self.step(index, self._latents(hidden, group), caches)
            if shown:
                results.append(self._head(group)(state, None)[0][0])
            del state  # the last output is large
        self.place.settle()
        if self.readout is None:
            # Also of one result, which can be a view: autograd forbids to write into those that a function returns.
            return torch.cat(results, self.decoder.time_axis)
        return torch.stack(results).sum()

    def step(self, index: int, latents: Tensor, caches: Caches) -> tuple[Hidden, Caches]:
        """One decoder call, in values: its output, and the caches after it."""
        units = self.units(index)
        caches = caches or [None] * len(units)
        state: Hidden = (latents,)
        after: Caches = []
        for number, unit in enumerate(units):
            cache = self.place.get(caches[number])
            self.place.fetch(*caches[number + 1 : number + 2])
            state, cache = unit(state, cache)
            after.append(self.place.put(cache))
        return state, after

    def backward(self, hidden: Tensor, kept: dict[int, Caches], cotangents: Sequence[Tensor | None]) -> _Gradient:
        """The gradient, given the cotangent of each group's pixels or readout (`None` where it is not shown).

        Empties `kept`.
        """
        gradient = _Gradient(hidden, self.weights)
        if self.local:
            caches: Caches = []
            for index, (group, own) in enumerate(zip(self.groups, cotangents, strict=True)):
                for part in self.decoder.parts(group):
                    piece = own
                    if own is not None and self.readout is None:
                        start = group.frames.start
                        piece = own[self._at(slice(part.frames.start - start, part.frames.stop - start))]
                    _, _, caches = self.pull(index, part, hidden, caches, [(piece, [])], gradient, carry=False)
            return gradient

        pending: list[CacheCotangents] = []  # of the caches after the group at hand
        for index, caches in self._replayed(hidden, kept):
            own = cotangents[index]
            if self.distance is not None:
                # One for each later group of pixels, the nearest first: each has an end of the band of its own.
                pulls = [(own, []), *((None, after) for after in pending)]
            else:  # without a band all later groups share one, because pulling back is linear
                pulls = [(own, after) for after in pending or [[]]]
            _, pending, _ = self.pull(index, self.groups[index], hidden, caches, pulls, gradient, carry=index > 0)
            if self.distance is not None:
                pending = pending[: self.distance]
        return gradient

    def _replayed(self, hidden: Tensor, kept: dict[int, Caches]) -> Iterator[tuple[int, Caches]]:
        """The groups from the last to the first, each with the caches before it."""
        stop = len(self.groups)
        for start in sorted(kept, reverse=True):
            segment = [kept.pop(start)]
            for index in range(start, stop - 1):
                with self.conditions[index].again(), torch.no_grad():
                    segment.append(self.step(index, self._latents(hidden, self.groups[index]), segment[-1])[1])
            while segment:
                yield start + len(segment) - 1, segment.pop()
            stop = start

    def pull(
        self,
        index: int,
        group: Group,
        hidden: Tensor,
        caches: Caches,
        pulls: Sequence[tuple[Tensor | None, CacheCotangents]],
        gradient: _Gradient,
        carry: bool,
        first: bool = False,
    ) -> tuple[Tensor | None, list[CacheCotangents], Caches]:
        """Run one group, and pull pairs of cotangents (of its result, of the caches after it) back through it.

        The units run forward without a graph, which keeps what each was given, then one after the other again, with a
        graph, from the last to the first. Adds to `gradient`. Returns the result of the group; for each pair the
        cotangents of the caches before it, if they are to be carried; and the caches after it, if groups are local.

        Args:
            first: The group has not run before: what it draws is drawn from the random state as it is.
        """
        latents = self._latents(hidden, group).detach()
        units = self.units(index)
        caches = caches or [None] * len(units)
        if all(own is None and not after for own, after in pulls):
            if not self.decoder.recurrent:
                return None, [], []
            with self.conditions[index].again(), torch.no_grad():
                return None, [[] for _ in pulls], self.step(index, latents, caches)[1]

        last = len(units) - 1
        graph: Graph | RowGraphs | None = None
        given: list[Any] = []
        conditions: list[Conditions] = []
        after_group: Caches = []
        state: Hidden = (latents,)
        with self.conditions[index].again(random=not first):
            for number, unit in enumerate(units):
                conditions.append(Conditions(latents.device))
                cache = self.place.get(caches[number])
                self.place.fetch(*caches[number + 1 : number + 2])
                if number == last and not self._by_rows(unit, state):  # it need not run twice
                    through_hidden = gradient.needs_hidden or number > 0
                    graph = self._graph(unit, state, cache, None, through_hidden, carry)
                    assert isinstance(graph, Graph)
                    state, cache = graph.output, graph.after
                else:
                    given.append(self.place.put(state))
                    with torch.no_grad(), self._lean():
                        state, cache = unit(state, cache)
                if self.local:
                    after_group.append(self.place.put(cache))
                del cache
            head = Graph(self._head(group), state[:1], None)
        result = head.output[0]
        states: list[Cotangents] = []
        for own, _ in pulls:
            pulled = head.pull([own], [], self.weights, again=True)
            gradient.add_weights(pulled.weights)
            # Shortcuts that the last unit passed on lead nowhere.
            states.append(pulled.hidden and [*pulled.hidden, *(None for _ in state[1:])])
        del state, head, pulled

        before: list[CacheCotangents] = [[] for _ in pulls]
        for number in range(last, -1, -1):
            if graph is None:
                state, cache = self.place.get(given.pop()), self.place.get(caches[number])
                meanwhile = partial(self._turn_round, [*given[-1:], *caches[max(0, number - 1) : number]])
                through_hidden = gradient.needs_hidden or number > 0
                graph = self._graph(units[number], state, cache, conditions[number], through_hidden, carry, meanwhile)
                del state, cache
            for turn, (_, after) in enumerate(pulls):
                of_after = self.place.get(after[number]) if after else []
                pulled = graph.pull(states[turn], of_after, self.weights, again=turn + 1 < len(pulls))
                states[turn] = pulled.hidden
                gradient.add_weights(pulled.weights)
                if carry:
                    before[turn].append(self.place.put(pulled.cache))
                del of_after, pulled
            graph = None
        for cotangents in states:
            if cotangents:
                gradient.add_hidden(self._at(group.latents), cotangents[0])
        return result, [units_before[::-1] for units_before in before], after_group

    # --- small parts ---

    def _turn_round(self, stored: list[Any]) -> None:
        """In the first half of a unit's work, what the one before left behind moves out; then the next one's moves in.

        Not both at a time: that would be what the peak is made of.
        """
        self.place.settle()
        self.place.fetch(*stored)

    def _at(self, span: slice) -> tuple[slice, ...]:
        return (*(slice(None),) * self.decoder.time_axis, span)

    def _latents(self, hidden: Tensor, group: Group) -> Tensor:
        return hidden[self._at(group.latents)]

    def _head(self, group: Group) -> Block:
        """From the output of a group's blocks to its pixels, or to what is read out of them."""

        def pixels(output: Tensor) -> Tensor:
            made = self.decoder.epilogue(output, self.clamp)
            return made if self.readout is None else self.readout(group, made)

        return stateless(pixels)

    def _by_rows(self, unit: Block, state: Hidden) -> bool:
        assert self.replay is not None
        rows = self.replay.rows
        return rows is not None and isinstance(unit, Local) and state[0].shape[-2] * unit.scale > rows

    def _lean(self) -> AbstractContextManager[Any]:
        """For a run whose pixels nobody sees."""
        assert self.replay is not None
        return Lean(self.decoder.stable) if self.replay.lean else nullcontext()

    def _graph(
        self,
        unit: Block,
        state: Hidden,
        cache: Cache,
        conditions: Conditions | None,
        through_hidden: bool,
        carry: bool,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Graph | RowGraphs:
        """A unit with a graph, under the conditions of its run before; None: those of the moment are the same.

        `meanwhile` is called in the middle of its work.
        """
        assert self.replay is not None
        recording = partial(_recording, conditions, self._lean())
        if self._by_rows(unit, state):
            assert isinstance(unit, Local)
            assert self.replay.rows is not None
            return RowGraphs(unit, state, cache, recording, carry, self.replay.rows, meanwhile)
        graph = Graph(unit, state, cache, recording, through_hidden, carry)
        meanwhile()
        return graph


def _in_turn(blocks: Sequence[Block]) -> Block:
    """Blocks as one block, whose cache is the list of theirs."""

    def run(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
        after = []
        for block, own in zip(blocks, cache or [None] * len(blocks), strict=True):
            hidden, own = block(hidden, own)
            after.append(own)
        return hidden, after

    return run


@contextmanager
def _recording(conditions: Conditions | None, lean: AbstractContextManager[Any]) -> Iterator[None]:
    with conditions.again() if conditions else nullcontext(), lean:
        yield


def _in_float16(hidden: Tensor) -> bool:
    kind = hidden.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return torch.float16 in (hidden.dtype, autocast)


class _Gradient:
    """Sums of what the groups contribute to the gradients of the hidden latents and of the weights."""

    def __init__(self, hidden: Tensor, weights: Sequence[Tensor]) -> None:
        self.needs_hidden = hidden.requires_grad
        self.hidden = torch.zeros_like(hidden) if hidden.requires_grad else None
        self.weights: list[Tensor | None] = [None] * len(weights)

    def add_hidden(self, at: tuple[slice, ...], part: Tensor | None) -> None:
        if self.hidden is not None and part is not None:
            self.hidden[at] += part

    def add_weights(self, parts: Cotangents) -> None:
        if parts:
            self.weights = [plus(total, part) for total, part in zip(self.weights, parts, strict=True)]

    def times(self, scale: Tensor) -> list[Tensor | None]:
        return [None if grad is None else grad * scale.to(grad.dtype) for grad in (self.hidden, *self.weights)]


class _Replayed(torch.autograd.Function):
    """The recurrence without a graph; its groups run again, with one, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, recurrence: Recurrence, hidden: Tensor, *weights: Tensor) -> Tensor:
        ctx.recurrence, ctx.kept = recurrence, {}
        ctx.save_for_backward(hidden)
        ctx.versions = versions(recurrence.decoder.vae)
        return recurrence.forward(hidden, ctx.kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        recurrence = ctx.recurrence
        _refuse_second_derivative()
        if versions(recurrence.decoder.vae) != ctx.versions:
            raise UsageError(
                "decode: weights of the VAE changed, or its mode, between forward and backward pass, which runs "
                "the decoder again; call backward() before optimizer.step()"
            )
        (hidden,) = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[1])
        if recurrence.readout is not None:
            cotangents: list[Tensor | None] = [gradient] * len(recurrence.groups)
        else:
            lengths = [
                g.frames.stop - g.frames.start
                for g, show in zip(recurrence.groups, recurrence.shown, strict=True)
                if show
            ]
            pieces = iter(gradient.split(lengths, recurrence.decoder.time_axis))
            cotangents = [next(pieces) if show else None for show in recurrence.shown]
        # The caches are let go group by group, unless this graph is to be used again.
        kept = dict(ctx.kept) if torch._C._autograd._get_current_graph_task_keep_graph() else ctx.kept
        total = recurrence.backward(hidden, kept, cotangents)
        recurrence.place.settle()
        return None, total.hidden, *total.weights


class _Fused(torch.autograd.Function):
    """Losses and their gradient group by group in the forward pass; the backward pass only scales."""

    @staticmethod
    def forward(ctx: Any, recurrence: Recurrence, hidden: Tensor, *weights: Tensor) -> Tensor:
        ctx.gradient = _Gradient(hidden, weights)
        losses: list[Any] = []
        caches: Caches = []
        one = torch.ones((), device=hidden.device)
        for index, group in enumerate(recurrence.groups):
            recurrence.conditions.append(Conditions(hidden.device))
            loss, _, caches = recurrence.pull(
                index, group, hidden, caches, [(one, [])], ctx.gradient, carry=False, first=True
            )
            losses.append(loss)
        recurrence.place.settle()
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        return None, *ctx.gradient.times(gradient)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # the engine enables it for create_graph=True only
        raise UsageError(
            "decode: second derivatives are not available; call backward() without create_graph=True, "
            "or decode with backprop=Full()"
        )

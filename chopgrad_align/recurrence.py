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
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.checkpoint import checkpoint

from .backprop import Backprop, Full, Truncated
from .decoders.base import Cache, Clamp, Decoder, Group, Hidden
from .errors import UsageError

Caches = list[Cache]
"""One cache a block: the state of the recurrence between two groups. An empty list before the first."""

Cotangents = list[Tensor | None]
"""One a leaf of `Caches`; `None` where there is no tensor or no gradient."""


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
        self.decoder, self.backprop, self.groups, self.readout = decoder, backprop, groups, readout
        self.shown = [True] * len(groups) if shown is None else shown
        self.weights: list[Tensor] = [p for p in decoder.vae.parameters() if p.requires_grad]
        self.conditions: list[_Conditions] = []
        # No gradient crosses groups: the backward pass may go forward in time, and needs no stored caches.
        self.local = not decoder.recurrent or (isinstance(backprop, Truncated) and backprop.distance == 0)

    def run(self, hidden: Tensor) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or bool(self.weights))
        if isinstance(self.backprop, Full) or not needs_gradient:
            return self.forward(hidden)
        if self.local and self.readout is not None:
            return _Fused.apply(self, hidden, *self.weights)
        return _Replayed.apply(self, hidden, *self.weights)

    def forward(self, hidden: Tensor, keep: dict[int, Caches] | None = None) -> Tensor:
        """All groups in order; fills `keep` with the caches before those groups from which `_replay` will start."""
        stride = 1
        if self.local:
            stride = len(self.groups)
        elif getattr(self.backprop, "cache", None) == "recompute":
            stride = math.ceil(math.sqrt(len(self.groups)))
        results = []
        caches: Caches = []
        for index, (group, shown) in enumerate(zip(self.groups, self.shown, strict=True)):
            if keep is not None:
                self.conditions.append(_Conditions(hidden.device))
                if index % stride == 0:
                    keep[index] = self._put_away(caches)
            if not shown and not self.decoder.recurrent:
                continue
            pixels, caches = self.step(index, self._latents(hidden, group), caches)
            if shown:
                results.append(self._read(group, pixels))
        if self.readout is None:
            return torch.cat(results, self.decoder.time_axis)
        return torch.stack(results).sum()

    def step(self, index: int, latents: Tensor, caches: Caches, recompute: bool = False) -> tuple[Tensor, Caches]:
        """One decoder call, in values: the pixels of the group, and the caches after it."""
        state: Hidden = (latents,)
        blocks = self.decoder.blocks(index)
        after: Caches = []
        for block, cache in zip(blocks, caches or [None] * len(blocks), strict=True):
            if recompute:
                state, cache = checkpoint(block, state, cache, use_reentrant=False)
            else:
                state, cache = block(state, cache)
            after.append(cache)
        return self.decoder.epilogue(state[0], clamp_of(self.backprop)), after

    def backward(self, hidden: Tensor, kept: dict[int, Caches], cotangents: Sequence[Tensor | None]) -> _Gradient:
        """The gradient, given the cotangent of each group's pixels or readout (`None` where it is not shown)."""
        gradient = _Gradient(hidden, self.weights)
        if self.local:
            caches: Caches = []
            for index, (group, own) in enumerate(zip(self.groups, cotangents, strict=True)):
                for part in self.decoder.parts(group):
                    piece = own
                    if own is not None and self.readout is None:
                        start = group.frames.start
                        piece = own[self._at(slice(part.frames.start - start, part.frames.stop - start))]
                    _, _, caches = self.pull(index, part, hidden, caches, [(piece, None)], gradient, carry=False)
            return gradient

        pending: Sequence[Cotangents | None] = []  # of the caches after the group at hand
        for index, caches in self._replay(hidden, kept):
            own = cotangents[index]
            if isinstance(self.backprop, Truncated):
                # One for each later group of pixels, the nearest first: each has an end of the band of its own.
                pulls = [(own, None), *((None, after) for after in pending)]
            else:  # without a band all later groups share one, because pulling back is linear
                pulls = [(own, after) for after in pending or [None]]
            _, pending, _ = self.pull(index, self.groups[index], hidden, caches, pulls, gradient, carry=index > 0)
            if isinstance(self.backprop, Truncated):
                pending = pending[: self.backprop.distance]
        return gradient

    def _replay(self, hidden: Tensor, kept: dict[int, Caches]) -> Iterator[tuple[int, Caches]]:
        """The groups from the last to the first, each with the caches before it."""
        stop = len(self.groups)
        for start in sorted(kept, reverse=True):
            segment = [tree_map_only(Tensor, lambda t: t.to(hidden.device), kept[start])]
            for index in range(start, stop - 1):
                with self.conditions[index].again(), torch.no_grad():
                    latents = self._latents(hidden, self.groups[index])
                    segment.append(self.step(index, latents, segment[-1])[1])
            while segment:
                yield start + len(segment) - 1, segment.pop()
            stop = start

    def pull(
        self,
        index: int,
        group: Group,
        hidden: Tensor,
        caches: Caches,
        pulls: Sequence[tuple[Tensor | None, Cotangents | None]],
        gradient: _Gradient,
        carry: bool,
    ) -> tuple[Tensor | None, list[Cotangents], Caches]:
        """Run one group with a graph, and pull pairs of cotangents (of its result, of the caches after it) through it.

        Adds to `gradient`. Returns the result of the group; for each pair the cotangents of the caches before it, if
        they are to be carried; and the caches after it.
        """
        latents = self._latents(hidden, group).detach()
        if all(own is None and not after for own, after in pulls):
            if not self.decoder.recurrent:
                return None, [], []
            with self.conditions[index].again(), torch.no_grad():
                return None, [[] for _ in pulls], self.step(index, latents, caches)[1]

        # Detached, because the graph of this group must end where the group does.
        leaves, structure = tree_flatten(caches)
        leaves = [leaf.detach().requires_grad_(carry) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)] if carry else []
        if gradient.needs_hidden:
            inputs.append(latents.requires_grad_())
        with self.conditions[index].again(), torch.enable_grad():
            recompute = getattr(self.backprop, "checkpoint", False)
            pixels, after = self.step(index, latents, tree_unflatten(leaves, structure), recompute)
            result = self._read(group, pixels)

        before: list[Cotangents] = []
        for turn, (own, cotangents) in enumerate(pulls):
            roots = [] if own is None else [(result, own.to(result.dtype))]
            if cotangents:
                roots += [(o, c) for o, c in zip(tree_flatten(after)[0], cotangents, strict=True) if c is not None]
            if not roots:
                before.append([])
                continue
            outputs, weights = zip(*roots, strict=True)
            last = turn == len(pulls) - 1
            grads = torch.autograd.grad(
                outputs, inputs + self.weights, weights, retain_graph=not last, allow_unused=True
            )
            grads_of = dict(zip(map(id, inputs), grads, strict=False))
            before.append([grads_of.get(id(leaf)) for leaf in leaves] if carry else [])
            gradient.add(self._at(group.latents), grads_of.get(id(latents)), grads[len(inputs) :])
        return result.detach(), before, tree_map_only(Tensor, Tensor.detach, after)

    # --- small parts ---

    def _at(self, span: slice) -> tuple[slice, ...]:
        return (*(slice(None),) * self.decoder.time_axis, span)

    def _latents(self, hidden: Tensor, group: Group) -> Tensor:
        return hidden[self._at(group.latents)]

    def _read(self, group: Group, pixels: Tensor) -> Tensor:
        return pixels if self.readout is None else self.readout(group, pixels)

    def _put_away(self, caches: Caches) -> Caches:
        if getattr(self.backprop, "cache", None) == "host":
            return tree_map_only(Tensor, lambda t: t.to("cpu"), caches)
        return caches


class _Gradient:
    """Sums of what the groups contribute to the gradients of the hidden latents and of the weights."""

    def __init__(self, hidden: Tensor, weights: Sequence[Tensor]) -> None:
        self.needs_hidden = hidden.requires_grad
        self.hidden = torch.zeros_like(hidden) if hidden.requires_grad else None
        self.weights: list[Tensor | None] = [None] * len(weights)

    def add(self, at: tuple[slice, ...], latents: Tensor | None, weights: Sequence[Tensor | None]) -> None:
        if self.hidden is not None and latents is not None:
            self.hidden[at] += latents
        for i, grad in enumerate(weights):
            if grad is not None:
                total = self.weights[i]
                self.weights[i] = grad if total is None else total + grad

    def times(self, scale: Tensor) -> list[Tensor | None]:
        return [None if grad is None else grad * scale.to(grad.dtype) for grad in (self.hidden, *self.weights)]


class _Replayed(torch.autograd.Function):
    """The recurrence without a graph; its groups run again, with one, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, recurrence: Recurrence, hidden: Tensor, *weights: Tensor) -> Tensor:
        ctx.recurrence, ctx.kept = recurrence, {}
        ctx.save_for_backward(hidden)
        ctx.versions = _versions(recurrence.decoder.vae)
        return recurrence.forward(hidden, ctx.kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        recurrence = ctx.recurrence
        _refuse_second_derivative()
        if _versions(recurrence.decoder.vae) != ctx.versions:
            raise UsageError(
                "decode: weights of the VAE changed between the forward and the backward pass, which runs the decoder "
                "again; call backward() before optimizer.step()"
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
        total = recurrence.backward(hidden, ctx.kept, cotangents)
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
            recurrence.conditions.append(_Conditions(hidden.device))
            loss, _, caches = recurrence.pull(index, group, hidden, caches, [(one, None)], ctx.gradient, carry=False)
            losses.append(loss)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        return None, *ctx.gradient.times(gradient)


class _Conditions:
    """The autocast and random state under which a group first ran, so that it can run again the same."""

    def __init__(self, device: torch.device) -> None:
        kinds = {device.type, "cpu"}
        self._autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        self._random = torch.get_rng_state()
        self._device = device
        self._device_random = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def again(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([] if self._device_random is None else [self._device]))
            torch.set_rng_state(self._random)
            if self._device_random is not None:
                torch.cuda.set_rng_state(self._device_random, self._device)
            for kind, enabled, dtype in self._autocast:
                # Without autocast's cache, which could hold weights that were cast when no gradient was recorded.
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield


def clamp_of(backprop: Backprop) -> Clamp:
    """The clamp to [-1, 1] with the gradient that the policy asks for."""
    return _clamp if backprop.saturated == "zero" else _ClampPassThrough.apply


class _ClampPassThrough(torch.autograd.Function):
    """Clamp to [-1, 1] whose gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _clamp(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _clamp(x: Tensor) -> Tensor:
    return torch.clamp(x, min=-1.0, max=1.0)


def _versions(module: nn.Module) -> list[int]:
    return [tensor._version for tensor in (*module.parameters(), *module.buffers())]


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # the engine enables it for create_graph=True only
        raise UsageError(
            "decode: second derivatives are not available; call backward() without create_graph=True, "
            "or decode with backprop=Full()"
        )

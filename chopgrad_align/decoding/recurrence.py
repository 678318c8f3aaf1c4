r"""A decoding as a recurrence over frame groups, in values: what each group is given, and what is made of its output.

With latents $z_i$, pixels $x_i$ and causal caches $c_i$ of the groups $i = 0 \dots G-1$ it is

$$ (x_i, c_{i+1}) = f(z_i, c_i), \qquad c_0 \text{ empty}. $$

Plain autograd through `value` is full backpropagation through time; policies are other ways to the gradient of `value`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .decoders.base import Block, Cache, Clamp, Decoder, Group, Hidden
from .offload import Device, Place

Caches = list[Any]
"""The caches between two groups, one a block, as their place returned them; empty before the first group."""

GroupLoss = Callable[[Group, Tensor], Tensor]
"""`f(group, pixels) -> scalar`."""


@dataclass(frozen=True)
class Recurrence:
    """A decoding. Its value is the pixels of the groups that are shown, or the sum of their `group_loss`.

    Attributes:
        groups: The decoder calls, in order; a decoding of few frames has less than the model's own.
        clamp: Limits pixels, with the gradient that the policy asks for.
        shown: For each group, whether the value has it. Without `group_loss` at least one is shown.
        whole_groups: Take all blocks of a group as one block.
    """

    decoder: Decoder
    groups: Sequence[Group]
    clamp: Clamp
    shown: Sequence[bool]
    group_loss: GroupLoss | None = None
    whole_groups: bool = False

    def value(
        self,
        latents: Tensor,
        place: Place = Device(),  # noqa: B008 (without state)
        before: Callable[[int, Caches], None] = lambda index, caches: None,
    ) -> Tensor:
        """The value, of latents after the decoder's prologue.

        Args:
            place: For the caches between groups.
            before: Called before each group with its number and the caches that it is given, in a list that the group
                empties.
        """
        results: list[Tensor] = []
        caches: Caches = []
        for index, (group, shown) in enumerate(zip(self.groups, self.shown, strict=True)):
            before(index, caches)
            if not shown and not self.decoder.recurrent:
                continue
            is_last = index == len(self.groups) - 1
            hidden, caches = self.step(index, self.latents_of(latents, group), caches, place, keep=not is_last)
            if shown:
                results.append(self.result(group, hidden[0]))
            del hidden  # the last output is large
        place.synchronize()
        return self.joined(results)

    def step(
        self,
        index: int,
        latents: Tensor,
        caches: Caches,
        place: Place = Device(),  # noqa: B008 (without state)
        keep: bool = True,
    ) -> tuple[Hidden, Caches]:
        """Call the decoder once: the output of group number `index`, and the caches after it.

        Args:
            index: Of the group.
            latents: Of the group.
            caches: Those before it. The list is emptied, so that each is let go when its block has run.
            place: Where caches are.
            keep: False for a group after which none are needed.
        """
        blocks = self.blocks(index)
        caches = caches or [None] * len(blocks)
        hidden: Hidden = (latents,)
        after: Caches = []
        for block in blocks:
            cache = place.load(caches.pop(0))
            place.prefetch(*caches[:1])
            hidden, cache = block(hidden, cache)
            if keep:
                after.append(place.offload(cache))
        return hidden, after

    def blocks(self, index: int) -> Sequence[Block]:
        """The blocks of group number `index`."""
        blocks = self.decoder.blocks(index)
        return [_in_turn(blocks)] if self.whole_groups else blocks

    def result(self, group: Group, output: Tensor) -> Tensor:
        """A group's pixels, or their loss, made of the output of its last block."""
        pixels = self.decoder.epilogue(output, self.clamp)
        return pixels if self.group_loss is None else self.group_loss(group, pixels)

    def joined(self, results: Sequence[Tensor]) -> Tensor:
        """The value, made of the results of the groups that are shown, in order."""
        if self.group_loss is not None:
            return torch.stack(list(results)).sum()
        # Also of one result, which can be a view: autograd forbids to write into those that a function returns.
        return torch.cat(list(results), self.decoder.time_axis)

    def cotangents(self, of_value: Tensor) -> list[Tensor | None]:
        """The cotangent of each group's result, given that of the value; `None` for groups that are not shown."""
        if self.group_loss is not None:
            return [of_value if shown else None for shown in self.shown]
        groups = zip(self.groups, self.shown, strict=True)
        lengths = [group.frames.stop - group.frames.start for group, shown in groups if shown]
        pieces = iter(of_value.split(lengths, self.decoder.time_axis))
        return [next(pieces) if shown else None for shown in self.shown]

    def latents_of(self, latents: Tensor, group: Group) -> Tensor:
        """The latents of one group, a view."""
        return latents[self.at(group.latents)]

    def at(self, span: slice) -> tuple[slice, ...]:
        """The index of a span of frames, of latents or of pixels."""
        return (*(slice(None),) * self.decoder.time_axis, span)

    @property
    def weights(self) -> list[Tensor]:
        """The weights of the VAE that require a gradient."""
        return [weight for weight in self.decoder.vae.parameters() if weight.requires_grad]


def _in_turn(blocks: Sequence[Block]) -> Block:
    """Blocks as one block, whose cache is the list of theirs."""

    def run(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
        after = []
        for block, own in zip(blocks, cache or [None] * len(blocks), strict=True):
            hidden, own = block(hidden, own)
            after.append(own)
        return hidden, after

    return run

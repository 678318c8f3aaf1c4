"""What the decoding engine asks of a video decoder: to be a recurrence whose caches are values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Hidden = tuple[Tensor, ...]
"""What one block hands to the next: the hidden state, and any shortcut that a later block will need."""

Cache = Any
"""A block's causal cache: any nesting of lists, tuples and dicts of tensors, `None` and strings; at first `None`."""

Block = Callable[[Hidden, Cache], tuple[Hidden, Cache]]
"""A piece of one decoder call. It must not write into what it is given, nor keep anything: it may be run again."""


@dataclass(frozen=True)
class Group:
    """The latent frames of one decoder call and the pixel frames that it makes, both along the time axis."""

    latents: slice
    frames: slice


class Decoder(ABC):
    """A decoder as a recurrence over frame groups: `(pixels_i, caches_{i+1}) = f(latents_i, caches_i)`.

    `f` is given as a list of blocks, each with a cache of its own, because a block is the unit of recomputation.
    A decoder without caches is the special case in which every block returns `None` as its cache.

    To add a decoder, write a subclass and pass it to `chopgrad_align.decoders.register`.
    """

    time_axis: int = 2
    """The axis of latents and pixels along which groups follow each other."""

    recurrent: bool = True
    """Whether a group needs the caches of the one before it."""

    sliced: bool = False
    """Whether the model now decodes the samples of a batch one by one (`vae.enable_slicing()`)."""

    def __init__(self, vae: nn.Module) -> None:
        self.vae: Any = vae  # to a type checker every layer of a module would be a tensor or a module

    @abstractmethod
    def groups(self, latents: Tensor) -> list[Group]:
        """The decoder calls that the model itself makes for these latents, in order."""

    @abstractmethod
    def parts(self, group: Group) -> list[Group]:
        """The group cut into pieces that do not depend on each other; `[group]` if it cannot be."""

    @abstractmethod
    def prologue(self, latents: Tensor) -> Tensor:
        """What the model does to all latents at once before the first group; left to plain autograd."""

    @abstractmethod
    def blocks(self, index: int) -> Sequence[Block]:
        """The blocks of group number `index`: the first receives `(latents_i,)`, the last returns `(output_i,)`."""

    @abstractmethod
    def epilogue(self, output: Tensor, clamp: Callable[[Tensor], Tensor]) -> Tensor:
        """From a group's output to its pixels; `clamp` limits to [-1, 1] and must be used where the model clamps."""


def stateless(module: Callable[[Tensor], Tensor]) -> Block:
    """A block without a cache that maps the hidden state and passes shortcuts on."""

    def block(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
        return (module(hidden[0]), *hidden[1:]), None

    return block

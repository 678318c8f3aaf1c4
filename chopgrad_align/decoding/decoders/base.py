"""The interface of a video decoder to the decoding engine: a recurrence whose caches are values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Hidden = tuple[Tensor, ...]
"""The state between two blocks: the hidden state, and any shortcut that a later block will need."""

Cache = Any
"""A block's causal cache: any nesting of lists, tuples and dicts of tensors, `None` and strings; at first `None`."""

Block = Callable[[Hidden, Cache], tuple[Hidden, Cache]]
"""A piece of one decoder call. It must not write into what it is given, nor keep anything: it may be run again."""


@dataclass(frozen=True)
class SpatiallyLocalBlock:
    """A block that is local in space, so that the engine may run it on a few rows at a time.

    Each row of its output needs the rows of its input and caches from `halo` above to `halo` below it only; all its
    caches have as many rows as its input. It maps the hidden state and passes shortcuts on.
    """

    run: Callable[[Tensor, Cache], tuple[Tensor, Cache]]
    halo: int
    """Rows of the input beyond those that an output row lies on: one for each 3x3 convolution."""
    scale: int = 1
    """Rows of output for each row of input."""

    def __call__(self, hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
        output, cache = self.run(hidden[0], cache)
        return (output, *hidden[1:]), cache


Clamp = Callable[[Tensor], Tensor]
"""A function that limits pixels to their range, with the gradient that the policy asks for."""


@dataclass(frozen=True)
class Group:
    """The latent frames of one decoder call and the pixel frames that it makes, both along the time axis."""

    latents: slice
    frames: slice


class Decoder(ABC):
    """A decoder as a recurrence over frame groups: `(pixels_i, caches_{i+1}) = f(latents_i, caches_i)`.

    `f` is given as a list of blocks, each with a cache of its own, because a block is the unit of recomputation.
    A decoder without caches is the special case in which every block returns `None` as its cache.

    To add a decoder, write a subclass and pass it to `chopgrad_align.register_decoder`: `groups` and `blocks` are its
    substance. One that has no caches derives from `WholeDecoder` and gives `count_frames` and `blocks` only. One that
    the model runs in tiles is wrapped in `tiles.SpatialTiles` or `tiles.TemporalTiles`.
    """

    time_axis: int = 2
    """The axis of latents and pixels along which groups follow each other."""

    recurrent: bool = True
    """True if a group needs the caches of the one before it."""

    insensitive_to_rounding: bool = False
    """True if rounding of activations hardly moves the gradient: not where a normalisation can divide by the spread of
    a few values that are nearly the same."""

    sliced: bool = False
    """True if the model now decodes the samples of a batch one by one (`vae.enable_slicing()`)."""

    def __init__(self, vae: nn.Module) -> None:
        self.vae: Any = vae  # to a type checker every layer of a module would be a tensor or a module

    @abstractmethod
    def groups(self, latents: Tensor) -> list[Group]:
        """The decoder calls that the model itself makes for these latents, in order."""

    @abstractmethod
    def independent_frames(self, group: Group) -> list[Group]:
        """The group cut into pieces that do not depend on each other; `[group]` if it cannot be."""

    def spans(self, latents: Tensor) -> list[slice]:
        """All frames in the smallest consecutive pieces that are decoded at once."""
        return [piece.frames for group in self.groups(latents) for piece in self.independent_frames(group)]

    @abstractmethod
    def prologue(self, latents: Tensor) -> Tensor:
        """Do what the model does to all latents at once before the first group; left to plain autograd."""

    @abstractmethod
    def blocks(self, index: int) -> Sequence[Block]:
        """The blocks of group number `index`: the first receives `(latents_i,)`, the last returns `(output_i,)`."""

    @abstractmethod
    def epilogue(self, output: Tensor, clamp: Clamp) -> Tensor:
        """Make pixels of a group's output; `clamp` limits to [-1, 1] and must be used where the model clamps."""


class WholeDecoder(Decoder):
    """A decoder that looks at all frames at once: one group, of which the backward pass recomputes block after block.

    The gradient is exact. Memory grows with the number of frames, but only by what the blocks hand to each other and
    by the activations of the largest block, far less than plain autograd's; `Exact(checkpoint=False)` saves nothing.
    """

    recurrent = False

    @abstractmethod
    def count_frames(self, latent_frames: int) -> int:
        """The number of pixel frames that the model makes of so many latent frames."""

    def groups(self, latents: Tensor) -> list[Group]:
        count = latents.shape[2]
        return [Group(slice(0, count), slice(0, self.count_frames(count)))]

    def independent_frames(self, group: Group) -> list[Group]:
        return [group]

    def prologue(self, latents: Tensor) -> Tensor:
        return latents

    def epilogue(self, output: Tensor, clamp: Clamp) -> Tensor:
        return output


class Tiled(ABC):
    """A decoder whose unit is a tile of the latents: each is decoded alone by `inner`, then all are blended.

    Blending is left to plain autograd: it is linear and keeps no activations.
    """

    framewise: bool
    """True if each tile has all frames, so that a choice of frames can be made before decoding."""

    time_axis: int
    """The axis of the pixels along which frames follow each other."""

    def __init__(self, inner: Decoder | Tiled) -> None:
        self.inner = inner
        self.vae: Any = inner.vae
        self.sliced: bool = inner.sliced
        self.time_axis = inner.time_axis

    @abstractmethod
    def tiles(self, latents: Tensor) -> list[Tensor]:
        """The tiles, in the order in which the model decodes them."""

    @abstractmethod
    def join(self, tiles: list[Tensor], latents: Tensor, clamp: Clamp) -> Tensor:
        """All pixels from those of the tiles; `clamp` limits to [-1, 1] and must be used where the model clamps.

        It may write into `tiles`, as the blending functions of the models do.
        """

    @abstractmethod
    def spans(self, latents: Tensor) -> list[slice]:
        """All frames in consecutive pieces of a size that a loss can be taken of at once."""


def stateless(module: Callable[[Tensor], Tensor]) -> Block:
    """A block without a cache that maps the hidden state and passes shortcuts on."""

    def block(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
        return (module(hidden[0]), *hidden[1:]), None

    return block

"""Policies of backpropagation through a video decoder: small frozen objects that are passed to `decode`.

A decoder is a recurrence over frame groups, `(x_i, c_{i+1}) = f(z_i, c_i)`: latents z_i in, pixels x_i out, with the
causal caches c_i carried along. G is the number of groups, F one forward pass of all groups, B one backward pass.

A policy of your own is a frozen dataclass that derives from `Groupwise`, and says what becomes of the caches'
cotangents, or from `Backprop`, which leaves all to its `run`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..common.arguments import whole_number
from ..common.errors import UsageError
from .binomial import states_of_first_run
from .clamp import plain_clamp, straight_through_clamp
from .decoders.base import Clamp
from .groupwise import groupwise
from .offload import Device, Host, Place
from .recurrence import Recurrence

CachePlace = Literal["device", "host", "recompute"]


@dataclass(frozen=True, kw_only=True)
class Backprop(ABC):
    """A way to the gradient of decoded pixels.

    Args:
        saturated: The gradient of a pixel that the decoder clamped to [-1, 1]. `"zero"` is the clamp's own, so that a
            burnt-out region cannot recover; `"pass"` lets the gradient through as if there were no clamp. The pixels
            are the same. Decoders without a clamp ignore it.
    """

    saturated: Literal["zero", "pass"] = "zero"

    def __post_init__(self) -> None:
        if self.saturated not in ("zero", "pass"):
            raise UsageError(f"{type(self).__name__}(saturated={self.saturated!r}): expected 'zero' or 'pass'")

    @abstractmethod
    def run(self, recurrence: Recurrence, latents: Tensor) -> Tensor:
        """Return `recurrence.value(latents)`, bit for bit, with this policy's gradient to latents and weights.

        Args:
            recurrence: The decoding. Its `step`, `result` and `joined` are the pieces of `value`; plain autograd
                differentiates all of them.
            latents: As the decoder's prologue returned them. Their gradient may not be asked for.
        """

    def clamp(self, low: float = -1.0, high: float = 1.0) -> Clamp:
        """The clamp of pixels to [low, high], with this policy's gradient where pixels are saturated."""
        return plain_clamp(low, high) if self.saturated == "zero" else straight_through_clamp(low, high)

    @property
    def one_pass(self) -> bool:
        """True if `decode_loss` takes the gradient of a group's loss while it decodes: F + B, and no group is kept."""
        return False


@dataclass(frozen=True)
class Full(Backprop):
    """Plain autograd: the reference. Keeps the activations of every group, so memory grows with the frames; F + B."""

    def run(self, recurrence: Recurrence, latents: Tensor) -> Tensor:
        """Return the value as it is, to plain autograd."""
        return recurrence.value(latents)


@dataclass(frozen=True, kw_only=True)
class Groupwise(Backprop):
    """A gradient group by group, from the last to the first, each of which runs again with its graph alone.

    The cotangents of the caches go from each group to the one before it. As it is here, all of them do, which is the
    exact gradient; a subclass that does otherwise overrides `cotangent_factor` or `truncation_distance`.

    Args:
        cache: Where the caches between groups wait for the backward pass. `"device"` keeps them beside the model;
            `"host"` moves them to host memory, so that device memory is constant in the number of frames;
            `"recompute"` keeps every sqrt(G)-th set and makes the others again (one more F).
        cache_sets: With one of the other two, the most sets of caches that are there at a time; the others are made
            again, in the fewest forward passes of groups that there can be (`chopgrad_align.decoding.binomial`): with 4
            sets of 20, one more F. One set of cotangents of caches comes beside them. None keeps all.
        checkpoint: Run the blocks of a group again one after the other, so that one block's activations are alive at a
            time, instead of the group's; one more F. With `cache="host"` also its caches, their cotangents and its
            input come to the device for its turn only.
        memory_efficient_layers: While a graph is recorded, convolutions of frozen weights keep no input, and
            normalisations keep their low-precision input only (`chopgrad_align.decoding.memory_efficient_layers`).
        rows: With `checkpoint`, run a block that is local in space on at most so many rows of its output at a time,
            with a halo of a few rows. Fewer rows take less memory and more time. None runs all at once; decoders whose
            blocks are not local ignore it.
    """

    cache: CachePlace = "device"
    cache_sets: int | None = None
    checkpoint: bool = True
    memory_efficient_layers: bool = True
    rows: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.cache not in ("device", "host", "recompute"):
            raise UsageError(f"{name}(cache={self.cache!r}): expected 'device', 'host' or 'recompute'")
        if self.cache_sets is not None:
            whole_number(f"{name}: cache_sets", self.cache_sets)
            if self.cache == "recompute":
                raise UsageError(
                    f"{name}(cache_sets={self.cache_sets}, cache='recompute'): two ways to keep less; use cache='host' "
                    "or 'device'"
                )
        if self.rows is not None:
            whole_number(f"{name}: rows", self.rows)
            if not self.checkpoint:
                raise UsageError(
                    f"{name}(rows={self.rows}, checkpoint=False): rows are of one block; use checkpoint=True"
                )

    def run(self, recurrence: Recurrence, latents: Tensor) -> Tensor:
        """Return the value, whose groups run again in the backward pass."""
        return groupwise(recurrence, latents, self)

    def cotangent_factor(self, group: int) -> float:
        """The factor for the cotangents of the caches that group number `group` was given, 1 or later in the decoding.

        They go on to the group before it times this factor; with 0 they are not made.
        """
        return 1.0

    def truncation_distance(self) -> int | None:
        """The number of earlier groups whose latents receive gradient from a group's pixels; `None` for all of them."""
        return None

    def place(self, device: torch.device) -> Place:
        """A place for the caches, and for the inputs and cotangents of blocks; one for each decoding."""
        return Host(device) if self.cache == "host" else Device()

    def kept_caches(self, groups: int) -> Iterable[int]:
        """The groups, of so many, before which caches are kept in the forward pass; 0 is one. Others are made again."""
        if self.cache == "recompute":
            return range(0, groups, math.ceil(math.sqrt(groups)))
        return states_of_first_run(groups, self.cache_sets)

    @property
    def one_pass(self) -> bool:
        return self.truncation_distance() == 0


@dataclass(frozen=True)
class Exact(Groupwise):
    """The exact gradient with one group's graph alive at a time: the default.

    The forward pass keeps only the caches between groups. The backward pass runs group after group again, the last
    one first, and carries the cotangent of the caches from each group to the one before it. Costs 2F + B, and with
    `checkpoint`, which is the default, 3F + B.
    """


@dataclass(frozen=True)
class Truncated(Groupwise):
    """ChopGrad (arXiv 2603.17812): dx_i/dz_j is taken as zero where i - j > distance; exact inside the band.

    `Truncated(0)` stores no caches and costs 2F + B, or F + B with a frame-wise loss (`decode_loss`): the cheapest
    there is. D ≥ 1 costs 2F + (D + 1)B, more than `Exact`, which has no error: choose it to reproduce the paper.
    With `checkpoint` each is one F more. `Truncated(G - 1)` equals `Exact`.

    Args:
        distance: The number of earlier groups whose latents receive gradient from a group's pixels; 0 or more.
    """

    distance: int

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("Truncated: distance", self.distance, at_least=0)

    def truncation_distance(self) -> int:
        """The policy's `distance`."""
        return self.distance


def expect_policy(caller: str, backprop: object) -> None:
    """Raise a UsageError for anything but a policy, such as the class of one."""
    if not isinstance(backprop, Backprop):
        raise UsageError(f"{caller}: backprop={backprop!r}: expected a policy, such as Exact() or Truncated(0)")

"""How to backpropagate through a video decoder: a small frozen object that is passed to `decode`.

A decoder is a recurrence over frame groups, `(x_i, c_{i+1}) = f(z_i, c_i)`: latents z_i in, pixels x_i out, with the
causal caches c_i carried along. G is the number of groups, F one forward pass of all groups, B one backward pass.

Every policy takes:
    saturated: The gradient of a pixel that the decoder clamped to [-1, 1]. `"zero"` is the clamp's own, so that a
        burnt-out region cannot recover; `"pass"` lets the gradient through as if there were no clamp. The pixels are
        the same. Decoders without a clamp ignore it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..common.errors import UsageError

CachePlace = Literal["device", "host", "recompute"]


@dataclass(frozen=True, kw_only=True)
class Backprop:
    """What all policies share; use one of the three below."""

    saturated: Literal["zero", "pass"] = "zero"

    def __post_init__(self) -> None:
        if self.saturated not in ("zero", "pass"):
            raise UsageError(f"{type(self).__name__}(saturated={self.saturated!r}): expected 'zero' or 'pass'")


@dataclass(frozen=True)
class Full(Backprop):
    """Plain autograd: the reference. Keeps the activations of every group, so memory grows with the frames; F + B."""


@dataclass(frozen=True, kw_only=True)
class Replay(Backprop):
    """What `Exact` and `Truncated` share: a group runs again in the backward pass, to have its graph alone.

    Args:
        cache: Where the caches between groups wait for the backward pass. `"device"` keeps them beside the model;
            `"host"` moves them to host memory, so that device memory is constant in the number of frames;
            `"recompute"` keeps every sqrt(G)-th set and makes the others again (one more F).
        checkpoint: Make the block the unit instead of the group: the blocks of a group run again one after the other,
            and one block's activations are alive at a time; one more F. With `cache="host"` also its caches, their
            cotangents and its input come to the device for its turn only.
        lean: While a graph is recorded, convolutions of frozen weights keep no input, and normalisations keep their
            low-precision input only (`chopgrad_align.decoding.lean`).
        rows: With `checkpoint`, run a block that is local in space on at most so many rows of its output at a time,
            with a halo of a few rows. Fewer rows take less memory and more time. None runs all at once; decoders whose
            blocks are not local ignore it.
    """

    cache: CachePlace = "device"
    checkpoint: bool = True
    lean: bool = True
    rows: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.cache not in ("device", "host", "recompute"):
            raise UsageError(f"{name}(cache={self.cache!r}): expected 'device', 'host' or 'recompute'")
        if self.rows is not None and (isinstance(self.rows, bool) or not isinstance(self.rows, int) or self.rows < 1):
            raise UsageError(f"{name}(rows={self.rows!r}): expected a whole number of rows, 1 or more, or None")
        if self.rows is not None and not self.checkpoint:
            raise UsageError(f"{name}(rows={self.rows}, checkpoint=False): rows are of one block; use checkpoint=True")


@dataclass(frozen=True)
class Exact(Replay):
    """The exact gradient with one group's graph alive at a time: the default.

    The forward pass keeps only the caches between groups. The backward pass runs group after group again, the last
    one first, and carries the cotangent of the caches from each group to the one before it. Costs 2F + B, and with
    `checkpoint`, which is the default, 3F + B.
    """


@dataclass(frozen=True)
class Truncated(Replay):
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
        if isinstance(self.distance, bool) or not isinstance(self.distance, int) or self.distance < 0:
            raise UsageError(f"Truncated(distance={self.distance!r}): expected a whole number of groups, 0 or more")


def expect_policy(caller: str, backprop: object) -> None:
    """Raise a UsageError for what is not a policy, such as the class of one."""
    if not isinstance(backprop, Backprop):
        raise UsageError(f"{caller}: backprop={backprop!r}: expected a policy, such as Exact() or Truncated(0)")

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

from .errors import UsageError

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


@dataclass(frozen=True)
class Exact(Backprop):
    """The exact gradient with one group's graph alive at a time: the default.

    The forward pass keeps only the caches between groups. The backward pass runs group after group again, the last
    one first, and carries the cotangent of the caches from each group to the one before it. Costs 2F + B.

    Args:
        cache: Where the caches between groups wait for the backward pass. `"device"` keeps them beside the model;
            `"host"` moves them to host memory, so that device memory is constant in the number of frames;
            `"recompute"` keeps every sqrt(G)-th set and makes the others again (3F + B).
        checkpoint: Recompute the blocks inside a group too, so that one block's activations are alive at a time; one
            more F, so that a decoder that decodes a clip whole costs 3F + B. Choose False for speed when the graph of
            a whole group fits.
    """

    cache: CachePlace = "device"
    checkpoint: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_cache(self.cache, "Exact")


@dataclass(frozen=True)
class Truncated(Backprop):
    """ChopGrad (arXiv 2603.17812): dx_i/dz_j is taken as zero where i - j > distance; exact inside the band.

    `Truncated(0)` stores no caches and costs 2F + B, or F + B with a frame-wise loss (`decode_loss`): the cheapest
    there is. D ≥ 1 costs 2F + (D + 1)B, more than `Exact`, which has no error: choose it to reproduce the paper.
    `Truncated(G - 1)` equals `Exact`.

    Args:
        distance: The number of earlier groups whose latents receive gradient from a group's pixels; 0 or more.
        cache, checkpoint: As for `Exact`.
    """

    distance: int
    cache: CachePlace = "device"
    checkpoint: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_cache(self.cache, "Truncated")
        if isinstance(self.distance, bool) or not isinstance(self.distance, int) or self.distance < 0:
            raise UsageError(f"Truncated(distance={self.distance!r}): expected a whole number of groups, 0 or more")


def _check_cache(cache: str, policy: str) -> None:
    if cache not in ("device", "host", "recompute"):
        raise UsageError(f"{policy}(cache={cache!r}): expected 'device', 'host' or 'recompute'")

"""How to backpropagate through a video decoder: a small frozen object that is passed to `decode`.

A decoder is a recurrence over frame groups, `(x_i, c_{i+1}) = f(z_i, c_i)`: latents z_i in, pixels x_i out, with the
causal caches c_i carried along. G is the number of groups, F one forward pass of all groups, B one backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import UsageError


@dataclass(frozen=True)
class Full:
    """Plain autograd: the reference. Keeps the activations of every group, so memory grows with the frames; F + B."""


@dataclass(frozen=True)
class Exact:
    """The exact gradient with one group's graph alive at a time: the default.

    The forward pass keeps only the caches between groups. The backward pass runs group after group again, the last
    one first, and carries the cotangent of the caches from each group to the one before it. Costs 2F + B.

    Args:
        cache: Where the caches of the groups wait for the backward pass. `"device"` keeps them beside the model,
            `"host"` moves them to pinned host memory, so that device memory is constant in the number of frames,
            `"recompute"` keeps about sqrt(G) of them and recomputes the others (3F + B).
        checkpoint: Recompute the blocks inside a group as well, so that one block's activations are alive at a time
            (one more forward pass of each group; choose False for speed when a whole group fits).
    """

    cache: Literal["device", "host", "recompute"] = "device"
    checkpoint: bool = True

    def __post_init__(self) -> None:
        if self.cache not in ("device", "host", "recompute"):
            raise UsageError(f"Exact(cache={self.cache!r}): expected 'device', 'host' or 'recompute'")


@dataclass(frozen=True)
class Truncated:
    """ChopGrad (arXiv 2603.17812): `dx_i/dz_j` is taken as zero where i - j > distance; exact inside the band.

    `Truncated(0)` ignores the caches: with a frame-wise loss (`decode_loss`) it costs F + B, the cheapest there is.
    A distance D ≥ 1 costs about F + (D + 1)(F + B), more than `Exact`, which has no error: choose it to reproduce the
    paper. `Truncated(G - 1)` equals `Exact`.

    Args:
        distance: The number of earlier groups whose latents receive gradient from a group's pixels; 0 or more.
        checkpoint: As for `Exact`.
    """

    distance: int
    checkpoint: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.distance, bool) or not isinstance(self.distance, int) or self.distance < 0:
            raise UsageError(f"Truncated(distance={self.distance!r}): expected a whole number of groups, 0 or more")


Backprop = Full | Exact | Truncated

"""Relative warping error: do errors stay on what moves."""

from __future__ import annotations

from torch import Tensor

from .warping_error import WarpingError


class RelativeWarpingError(WarpingError):
    """The warping error of the difference `video - target`, along the flow of the target: 0 for a perfect video.

    The warping error itself falls below the target's for a blurred video, whose colours change less along the motion;
    so it ranks blur first. Reading along a flow is linear, so here what the target's own colours change by cancels:
    what is left is how much the *error* of this frame differs from that of the next at the same place of the scene. An
    error that moves along costs nothing.

    Args:
        device, flow: As for `WarpingError`.
    """

    def __call__(self, video: Tensor, target: Tensor) -> float:
        return super().__call__(video - target, target)

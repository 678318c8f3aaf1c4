"""Frame difference: does the video change from frame to frame as the target does."""

from __future__ import annotations

from torch import Tensor

from .protocol import VideoLoss


class FrameDifference(VideoLoss):
    """`mean |(v_(t+1) - v_t) - (t_(t+1) - t_t)|` over pixels, colours and pairs; in [0, 2], 0 where v is the target.

    An error that stays the same costs nothing, one that flickers twice what L1 counts: it stands beside a loss of
    frames. One-step video super-resolution is trained with such a loss of frame differences, among others, in DOVE
    (arXiv 2505.16239).

    Args:
        pairs_per_chunk, inside, outside: As for `VideoLoss`.

    Raises:
        UsageError: As for `VideoLoss`.
    """

    def guide(self, target: Tensor) -> Tensor:
        return target.diff(dim=0)

    def error(self, frames: Tensor, guide: Tensor) -> Tensor:
        return (frames.diff(dim=0) - guide).abs().mean(1)

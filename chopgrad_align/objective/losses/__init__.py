"""Losses of a video's pixels against a target: what one is, how a mask weighs it, how one is named and loaded.

A loss is any callable `loss(video, target, mask) -> errors` as `Loss` says. `FrameLoss` is the base of those that
compare each frame alone: it subsamples, chunks and recomputes, so that a long video needs the memory of one chunk.
`VideoLoss` is the base of those that compare neighbouring frames. The losses of the package stand one a file, named in
`LOSSES`.
"""

from .loading import LOSSES, load_loss
from .protocol import FrameLoss, Loss, VideoLoss

__all__ = ["LOSSES", "FrameLoss", "Loss", "VideoLoss", "load_loss"]

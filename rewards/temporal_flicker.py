"""Temporal flicker: a reward without weights, by VBench's formula."""

from __future__ import annotations

from torch import Tensor

from chopgrad_align import Frames, SampledReward, UsageError

from .precision import wide


class TemporalFlicker(SampledReward):
    """VBench's temporal flickering (Huang et al., arXiv 2311.17982): 1 minus the mean change from frame to frame.

    The change is the mean absolute difference of all colours in [0, 1]: a still video has 1. VBench measures it on
    prompts of scenes that do not move; where things move, it is as much against their motion. Prompts are ignored.

    Args:
        frames: As for `SampledReward`; VBench reads all.

    Raises:
        UsageError: A video has one frame.
    """

    def __init__(self, *, frames: Frames = None) -> None:
        super().__init__(frames=frames)

    def score_video(self, video: Tensor, prompts: list[str]) -> Tensor:
        if video.shape[1] < 2:
            raise UsageError("temporal_flicker: expected a video of which 2 frames or more are read, got 1")
        return 1 - wide(video).diff(dim=1).abs().mean((1, 2, 3, 4))

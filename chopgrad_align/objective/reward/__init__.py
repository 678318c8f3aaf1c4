"""Rewards: what one is, which frames it reads, how one is named and loaded, and how a wrong one is found early.

A reward is any callable `reward(video, prompts) -> scores` as `Reward` says; `Samples` is what it can ask for beside.
`FrameReward` is the base of those that look at each frame alone: it subsamples, chunks and recomputes, so that a long
video needs the memory of one chunk.
`SampledReward` is the base of those that look at chosen frames together.
"""

from .checking import check_reward
from .frames import Frames, FrameSampler, frame_sampler
from .loading import load_reward
from .protocol import FrameReward, Reward, SampledReward, check_scores
from .reduction import Reduction, reduction
from .samples import Samples

__all__ = [
    "FrameReward",
    "FrameSampler",
    "Frames",
    "Reduction",
    "Reward",
    "SampledReward",
    "Samples",
    "check_reward",
    "check_scores",
    "frame_sampler",
    "load_reward",
    "reduction",
]

"""Warp consistency: do things keep their colours while they move."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from chopgrad_align.common.optical_flow import occluded, warp

from .optical_flow import PairReward


class WarpConsistency(PairReward):
    """The negated warping error of Lai et al., "Learning Blind Video Temporal Consistency" (arXiv 1808.00449).

    The next frame is warped back along the optical flow and compared with this one: mean squared difference of the
    colours in [0, 1] over the pixels that stay visible, then the mean over pairs of frames. The score is in [-1, 0]
    with colours in [0, 1]; a pair without any visible pixel counts 0, as officially, the best score for the worst jump.
    Pixels count as hidden where forward and backward flow disagree and at the edges of motion (thresholds of Sundaram
    et al. 2010, as officially). The flow is RAFT's (see `OpticalFlow`) where the paper took FlowNet2, and of the video
    itself, for there is no other. Prompts are ignored.

    The flow is a given for the gradient: it says which pixels belong together, and the reward changes their colours.
    In the paper too it comes from elsewhere, the video before processing. A gradient through RAFT would let training
    bend the flow instead, towards any place with the right colour, and cost RAFT's activations.

    Args:
        weights, model, updates, pairs_per_chunk: As for `PairReward`.
        detach_flow: False takes the gradient through the flow too: then it is that of the score, and finite
            differences agree with it.

    Raises:
        UsageError: As for `PairReward`.
    """

    def __init__(
        self,
        *,
        weights: str = "DEFAULT",
        model: Literal["large", "small"] = "large",
        updates: int = 12,
        pairs_per_chunk: int = 4,
        detach_flow: bool = True,
    ) -> None:
        super().__init__(weights=weights, model=model, updates=updates, pairs_per_chunk=pairs_per_chunk)
        self.detach_flow = detach_flow
        self.exact_gradient = not detach_flow

    def score_pairs(self, frames: Tensor) -> Tensor:
        first, second = frames[:-1], frames[1:]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_flow):
            flow = self.flow(first, second)
        with torch.no_grad():  # a mask is true or false
            visible = ~occluded(flow, self.flow(second, first)).unsqueeze(1)
        error = (warp(second.to(flow.dtype), flow) - first).square() * visible
        return -error.sum((1, 2, 3)) / (3 * visible.sum((1, 2, 3))).clamp(min=1)

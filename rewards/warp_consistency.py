"""Warp consistency: do things keep their colours while they move."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

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

    def score_pairs(self, frames: Tensor) -> Tensor:
        first, second = frames[:-1], frames[1:]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_flow):
            flow = self.flow(first, second)
        with torch.no_grad():  # a mask is true or false
            visible = ~occluded(flow, self.flow(second, first)).unsqueeze(1)
        error = (warp(second.to(flow.dtype), flow) - first).square() * visible
        return -error.sum((1, 2, 3)) / (3 * visible.sum((1, 2, 3))).clamp(min=1)


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """`image` `(N, C, H, W)` read, bilinearly, where `flow` `(N, 2, H, W)` in pixels leads; outside, at the border."""
    height, width = image.shape[-2:]
    rows, columns = (torch.arange(n, device=flow.device, dtype=flow.dtype) for n in (height, width))
    x, y = flow[:, 0] + columns, flow[:, 1] + rows.unsqueeze(1)
    grid = torch.stack([x * (2 / max(1, width - 1)) - 1, y * (2 / max(1, height - 1)) - 1], dim=-1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)


def occluded(forward: Tensor, backward: Tensor) -> Tensor:
    """Pixels that have no partner in the next frame, or lie at an edge of motion.

    Flows `(N, 2, H, W)` in pixels from this frame to the next and back -> `(N, H, W)`, boolean. Sundaram, Brox and
    Keutzer, "Dense point trajectories by GPU-accelerated large displacement optical flow" (ECCV 2010), section 4.
    """
    back = warp(backward, forward)
    length, back_length, round_trip = (v.square().sum(1) for v in (forward, back, forward + back))
    lost = round_trip > 0.01 * (length + back_length) + 0.5
    across = F.pad(forward.diff(dim=3), (0, 1)).square().sum(1)
    down = F.pad(forward.diff(dim=2), (0, 0, 0, 1)).square().sum(1)
    return lost | (across + down > 0.01 * length + 0.002)

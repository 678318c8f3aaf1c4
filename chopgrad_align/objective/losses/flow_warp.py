"""Flow warp: do things keep their colours while they move as they do in the target."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...common.optical_flow import OpticalFlow, occluded, warp
from .protocol import VideoLoss


class FlowWarp(VideoLoss):
    """`mean m_t |warp(v_(t+1), f_t) - v_t|` over pixels, colours and pairs; in [0, 1].

    The short-term temporal loss of Lai et al., "Learning Blind Video Temporal Consistency" (arXiv 1808.00449), backward
    in time: f is the flow of the target from frame t to the next, by RAFT where the paper took FlowNet2, and m is 1
    where it holds, which the paper decides softly by the colours of the input and this loss by forward and backward
    flow, as the paper's own warping error does (see `occluded`). Hidden pixels count as 0 in the mean. The flow is of
    the target alone and has no gradient.

    0 for a video whose colours follow the flow. So the target's own loss is not 0 where its light changes or its flow
    is wrong, and a flat video has none: it stands beside a loss of frames.

    Args:
        weights: A name of torchvision's RAFT weights for `model`, or the path of a file with such weights.
        model: `"large"` (5.3 million weights) or `"small"` (1.0).
        updates: Refinements of the flow; torchvision's default is 12.
        pairs_per_chunk, inside, outside: As for `VideoLoss`. RAFT runs once on each chunk, forward and backward in
            time; its flow, not its activations, is kept for the backward pass.

    Raises:
        UsageError: As for `VideoLoss`; the weights are missing, unreachable or of another model.
    """

    def __init__(
        self,
        *,
        weights: str = "DEFAULT",
        model: Literal["large", "small"] = "large",
        updates: int = 12,
        pairs_per_chunk: int = 4,
        inside: float = 1.0,
        outside: float = 1.0,
    ) -> None:
        super().__init__(pairs_per_chunk=pairs_per_chunk, inside=inside, outside=outside)
        self.flow = OpticalFlow("FlowWarp", weights, model, updates)
        self.requires_grad_(False).eval()

    def guide(self, target: Tensor) -> Tensor:
        """`(N, 3, H, W)`: the flow in pixels, and 1 where it holds."""
        forward, backward = self.flow(target[:-1], target[1:]), self.flow(target[1:], target[:-1])
        return torch.cat([forward, ~occluded(forward, backward).unsqueeze(1)], 1)

    def error(self, frames: Tensor, guide: Tensor) -> Tensor:
        flow, holds = guide.to(frames.dtype).split([2, 1], dim=1)
        return ((warp(frames[1:], flow) - frames[:-1]).abs() * holds).mean(1)

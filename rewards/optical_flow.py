"""The base of the rewards that measure the optical flow between neighbouring frames."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from chopgrad_align import UsageError
from chopgrad_align.common.arguments import whole_number
from chopgrad_align.common.optical_flow import OpticalFlow

from .whole_video import WholeVideoReward


class PairReward(WholeVideoReward):
    """A reward that looks at neighbouring frames by their optical flow; a video's score is the mean over its pairs.

    Args:
        weights: A name of torchvision's RAFT weights for `model`, or the path of a file with such weights.
        model: `"large"` (5.3 million weights) or `"small"` (1.0).
        updates: Refinements of the flow; torchvision's default is 12.
        pairs_per_chunk: How many pairs of frames are scored at a time. Each chunk runs again in the backward pass, so
            that the activations of one chunk are alive at any moment.

    Raises:
        UsageError: The weights are missing, unreachable or of another model, an argument is out of range, or a video
            has one frame.
    """

    def __init__(
        self,
        *,
        weights: str = "DEFAULT",
        model: Literal["large", "small"] = "large",
        updates: int = 12,
        pairs_per_chunk: int = 4,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.pairs_per_chunk = whole_number(f"{name}: pairs_per_chunk", pairs_per_chunk)
        self.flow = OpticalFlow(name, weights, model, updates)
        self.requires_grad_(False).eval()

    @abstractmethod
    def score_pairs(self, frames: Tensor) -> Tensor:
        """Score the N - 1 pairs of neighbours of `frames` `(N, 3, H, W)` in [0, 1]; returns `(N - 1,)`."""

    def score_sample(self, frames: Tensor, prompt: str) -> Tensor:
        if len(frames) < 2:
            raise UsageError(f"{type(self).__name__}: expected a video of 2 frames or more, got 1")
        size = self.pairs_per_chunk
        chunks = [frames[start : start + size + 1] for start in range(0, len(frames) - 1, size)]
        return torch.cat([checkpoint(self.score_pairs, chunk, use_reentrant=False) for chunk in chunks]).mean()

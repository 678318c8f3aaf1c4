"""Motion: how far things move from one frame to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from .optical_flow import PairReward


class Motion(PairReward):
    """Mean length of the optical flow between neighbouring frames, in pixels a frame, by RAFT (arXiv 2003.12039).

    0 for a still, without bound above; it grows with the resolution. To reach a certain speed rather than the highest,
    give the reward a target or a cap. Prompts are ignored. Preprocessing and gradient: see `OpticalFlow`.

    Args:
        weights, model, updates, pairs_per_chunk: As for `PairReward`.

    Raises:
        UsageError: As for `PairReward`.
    """

    def score_pairs(self, frames: Tensor) -> Tensor:
        return torch.linalg.vector_norm(self.flow(frames[:-1], frames[1:]), dim=1).mean((1, 2))

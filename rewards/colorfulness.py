"""Colorfulness: a reward without weights, by a formula."""

from __future__ import annotations

import torch
from torch import Tensor

from chopgrad_align import FrameReward, Frames


class Colorfulness(FrameReward):
    """Hasler and Süsstrunk, "Measuring colorfulness in natural images" (SPIE 2003), their metric M^(3).

    Spread plus 0.3 times the mean of the opponent colours red-green and yellow-blue, of 8-bit values: 0 for grey, 15
    slightly, 33 moderately, 59 quite, 109 extremely colourful (their table). Prompts are ignored.

    Args:
        frames, frames_per_chunk: As for `FrameReward`.
    """

    def __init__(self, *, frames: Frames = None, frames_per_chunk: int = 8) -> None:
        super().__init__(frames=frames, frames_per_chunk=frames_per_chunk)

    def score_frames(self, frames: Tensor, prompts: list[str]) -> Tensor:
        frames = frames.to(torch.promote_types(frames.dtype, torch.float32)) * 255
        red, green, blue = frames.flatten(2).unbind(1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue])  # (2, N, H·W)
        mean = opponents.mean(-1)
        variance = (opponents - mean.unsqueeze(-1)).square().mean(-1)
        # The root has no derivative at 0, where every grey frame lies: with eps, theirs is 0 and not NaN.
        eps = 1e-6
        spread, offset = ((v.sum(0) + eps).sqrt() for v in (variance, mean.square()))
        return spread + 0.3 * offset

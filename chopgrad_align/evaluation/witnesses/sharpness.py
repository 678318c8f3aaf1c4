"""Sharpness of frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .bounds import Bounds
from .protocol import Witness, luma

_LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


class Sharpness(Witness):
    """Standard deviation of the Laplacian of the brightness within a frame, mean over frames: 0 for one colour.

    The root of Pech-Pacheco et al.'s measure, "Diatom autofocusing in brightfield microscopy" (ICPR 2000), so that
    twice the contrast is twice the value. Noise raises it as detail does: too much is as suspicious as too little.
    """

    bounds = Bounds(0.6, 1.7)

    def observe(self, video: Tensor, prompts: list[str], seeds: Sequence[int]) -> Tensor:
        """See `Witness`."""
        frames = luma(video).flatten(0, 1).unsqueeze(1)
        laplacian = F.conv2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), frames.new_tensor(_LAPLACIAN)[None, None])
        return laplacian.flatten(1).std(1, correction=0).view(video.shape[:2]).mean(1)

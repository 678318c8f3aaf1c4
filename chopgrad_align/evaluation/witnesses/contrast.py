"""Contrast of frames."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .bounds import Bounds
from .protocol import Witness, luma


class Contrast(Witness):
    """Standard deviation of the brightness within a frame, in [0, 0.5], mean over frames.

    RMS contrast: Peli, "Contrast in complex images" (JOSA A 7(10), 1990).
    """

    bounds = Bounds(0.7, 1.4)

    def observe(self, video: Tensor, prompts: list[str], seeds: Sequence[int]) -> Tensor:
        """See `Witness`."""
        return luma(video).flatten(2).std(2, correction=0).mean(1)

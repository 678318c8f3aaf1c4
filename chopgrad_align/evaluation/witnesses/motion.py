"""Motion as change from frame to frame."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .bounds import Bounds
from .protocol import Witness


class Motion(Witness):
    """Mean absolute difference of neighbouring frames, over colours and pixels, in [0, 1]: 0 for a still.

    What reward models that average frames are fond of losing (VADER, arXiv 2407.08737). It rises with contrast too, and
    with flicker: read it beside these.
    """

    bounds = Bounds(0.8, 2.0)

    def observe(self, video: Tensor, prompts: list[str], seeds: Sequence[int]) -> Tensor:
        """See `Witness`; NaN for a single frame."""
        return video.float().diff(dim=1).abs().flatten(1).mean(1)

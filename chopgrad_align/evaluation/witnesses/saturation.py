"""Saturation of colours."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .bounds import Bounds
from .protocol import Witness


class Saturation(Witness):
    """Mean of the chroma of pixels, the largest minus the smallest of red, green and blue, in [0, 1]: 0 for grey.

    Not divided by the largest, as the saturation of HSV is: that is noise where it is dark.
    """

    bounds = Bounds(0.7, 1.4)

    def observe(self, video: Tensor, prompts: list[str], seeds: Sequence[int]) -> Tensor:
        """See `Witness`."""
        least, most = video.float().aminmax(dim=2)
        return (most - least).flatten(1).mean(1)

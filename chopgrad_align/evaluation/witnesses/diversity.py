"""Diversity between seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from torch import Tensor

from .bounds import Bounds
from .protocol import Witness
from .thumbnails import distance, thumbnails


class Diversity(Witness):
    """Mean root mean square difference of a video from those of other seeds of its condition, in [0, 1].

    Taken between thumbnails; 0 where all seeds give one video. Conditions with one seed have none: see
    `validation.seeds` in the config.
    """

    bounds = Bounds(least=0.7)

    def observe(self, video: Tensor, prompts: list[str], seeds: Sequence[int]) -> Tensor:
        """See `Witness`; a thumbnail."""
        return thumbnails(video)

    def values(self, kept: Sequence[Tensor], base: Sequence[Tensor], groups: Sequence[int]) -> list[float]:
        """See `Witness`; NaN for a video that is the only one of its condition."""
        places = range(len(kept))
        others = [[j for j in places if groups[j] == groups[i] and j != i] for i in places]
        return [fmean(distance(kept[i], kept[j]) for j in others[i]) if others[i] else math.nan for i in places]

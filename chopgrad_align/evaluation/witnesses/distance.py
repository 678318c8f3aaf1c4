"""Distance to the base model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .protocol import Witness
from .thumbnails import distance, thumbnails


class Distance(Witness):
    """Root mean square difference of a video from the base model's of the same condition and seed, in [0, 1].

    Taken between thumbnails of both. 0 before training, so that it has no ratio and no bounds: it says how much has
    changed, and how fast.
    """

    reads_base = True

    def observe(self, video: Tensor, prompts: list[str], seeds: Sequence[int]) -> Tensor:
        """See `Witness`; a thumbnail."""
        return thumbnails(video)

    def values(self, kept: Sequence[Tensor], base: Sequence[Tensor], groups: Sequence[int]) -> list[float]:
        """See `Witness`."""
        return [distance(one, other) for one, other in zip(kept, base, strict=True)]

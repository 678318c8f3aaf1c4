"""Running mean and spread of a term's scores, by which normalized terms are divided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..common.errors import UsageError

_REMEMBERED = 256  # videos; the statistics follow a reward that changes while it is trained
_LEAST_SHARE = 0.1  # of the first standard deviation


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of a reward's scores, followed over a run.

    Exponentially weighted, with a memory of about 256 videos (the update of mean and variance is West's, "Updating Mean
    and Variance Estimates", CACM 22(9), 1979, with constant weight). `least` keeps a reward on which all videos have
    come to agree from being blown up.
    """

    mean: float
    variance: float
    least: float

    @classmethod
    def of(cls, name: str, scores: Sequence[float]) -> Statistics:
        """Statistics of those of the first scores that are finite.

        Raises:
            UsageError: There are not two of them that differ.
        """
        values = torch.tensor([score for score in scores if math.isfinite(score)], dtype=torch.float64)
        variance = values.var().item() if len(values) > 1 else 0.0
        if not variance > 0:
            raise UsageError(
                f"rewards.{name}.normalize: all {len(scores)} held-out videos score {scores[0]:g}, so that there is no "
                "spread to divide by; leave it out"
            )
        return cls(values.mean().item(), variance, _LEAST_SHARE * math.sqrt(variance))

    @property
    def std(self) -> float:
        return max(math.sqrt(self.variance), self.least)

    def updated(self, scores: Sequence[float]) -> Statistics:
        """After further scores."""
        rate = 1 - (1 - 1 / _REMEMBERED) ** len(scores)
        values = torch.tensor(scores, dtype=torch.float64)
        step = values.mean().item() - self.mean
        spread = values.var(correction=0).item()
        variance = (1 - rate) * (self.variance + rate * step**2) + rate * spread
        return replace(self, mean=self.mean + rate * step, variance=variance)

"""Several rewards weighed together: where sign, weight, limits and reduction happen, once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .errors import UsageError
from .reward import Reward
from .reward.protocol import check_scores, frames_read, score

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
        """Of the first scores, two or more.

        Raises:
            UsageError: They are all the same.
        """
        values = torch.tensor(scores, dtype=torch.float64)
        variance = values.var().item()
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


@dataclass(frozen=True)
class Term:
    """One reward, and how much of it is wanted.

    Args:
        reward: Scores videos.
        weight: A negative one lowers the reward's score.
        cap: In the reward's own unit. A score beyond it, in the direction in which the weight pushes, counts as `cap`
            and has no gradient: `min(r, cap)` for a positive weight, `max(r, cap)` for a negative one.
        target: In the reward's own unit. The score is replaced by `-|r - target|`.
        normalize: Divide by the running standard deviation of the reward's scores, so that weights compare rewards of
            different units; without a target, their running mean is subtracted too.

    Raises:
        UsageError: Both a cap and a target.
    """

    reward: Reward
    weight: float = 1.0
    cap: float | None = None
    target: float | None = None
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.cap is not None and self.target is not None:
            raise UsageError("a term has a cap or a target, not both")

    def value(self, score: Tensor, statistics: Statistics | None = None) -> Tensor:
        """What scores `(B,)` add to the objective, in float32 or more; statistics belong to a normalized term."""
        value = score.to(torch.promote_types(score.dtype, torch.float32))
        if self.target is not None:
            value = -(value - self.target).abs()
        elif self.cap is not None:
            value = value.clamp(max=self.cap) if self.weight >= 0 else value.clamp(min=self.cap)
        if self.normalize:
            if statistics is None:
                raise ValueError("a normalized term needs statistics")
            value = (value if self.target is not None else value - statistics.mean) / statistics.std
        return self.weight * value


@dataclass(frozen=True)
class Objective:
    """The sum of named terms."""

    terms: dict[str, Term] = field(default_factory=dict)

    def frames_read(self, total: int, seeds: Sequence[int]) -> list[int]:
        """The frames of videos of `total` frames that some reward reads in some sample, in order."""
        read = (frames_read(term.reward, total, seeds) for term in self.terms.values())
        return sorted({frame for samples in read for sample in samples for frame in sample})

    def scores(self, video: Tensor, prompts: list[str], seeds: Sequence[int]) -> dict[str, Tensor]:
        """Each reward's own scores `(B,)` of `video` `(B, F, 3, H, W)` in [0, 1], whose unread frames can be anything.

        `seeds`, one a sample, decide which frames random samplers choose; equal samplers choose the same.
        """
        return {
            name: check_scores(f"reward {name!r}", score(term.reward, video, prompts, seeds), len(video))
            for name, term in self.terms.items()
        }

    def values(
        self,
        scores: Mapping[str, Tensor],
        weights: Mapping[str, Sequence[float]] | None = None,
        statistics: Mapping[str, Statistics] | None = None,
    ) -> dict[str, Tensor]:
        """What each term adds to the objective of each sample, `(B,)`; the objective is their sum.

        Args:
            scores: Of each term, from `scores`.
            weights: Of each term and sample, beside the term's own; default 1.
            statistics: Of each normalized term.
        """
        values = {name: term.value(scores[name], (statistics or {}).get(name)) for name, term in self.terms.items()}
        if weights is not None:
            values = {name: value * torch.tensor(weights[name]).to(value) for name, value in values.items()}
        return values

    def first_statistics(self, scores: Mapping[str, Sequence[float]]) -> dict[str, Statistics]:
        """Statistics of the normalized terms, from scores of each term.

        Raises:
            UsageError: A term whose scores are all the same.
        """
        return {name: Statistics.of(name, scores[name]) for name, term in self.terms.items() if term.normalize}

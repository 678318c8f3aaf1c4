"""Rewards and losses weighed together: where sign, weight, limits and reduction happen, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .reward.protocol import check_scores
from .statistics import Statistics
from .terms import Reference, Term

_NOTHING = Reference()
_NONE: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Objective:
    """The sum of named terms, which should rise."""

    terms: dict[str, Term] = field(default_factory=dict)

    @property
    def reads_pixels(self) -> bool:
        """True if a video has to be decoded for it at all."""
        return any(term.reads_pixels for term in self.terms.values())

    @property
    def reads_latents(self) -> bool:
        """True if the true latents are wanted."""
        return any(term.reads_latents for term in self.terms.values())

    @property
    def reads_base(self) -> bool:
        """True if the untrained model's predictions are wanted."""
        return any(term.reads_base for term in self.terms.values())

    @property
    def reads_sample(self) -> bool:
        """True if some term wants what the data say of each video."""
        return any(term.reads_sample for term in self.terms.values())

    @property
    def reads_audio(self) -> bool:
        """True if some term wants the sound."""
        return any(term.reads_audio for term in self.terms.values())

    @property
    def measured(self) -> Objective:
        """The terms that a finished video can be measured by; the others belong to training."""
        return Objective({name: term for name, term in self.terms.items() if not term.reads_base})

    def frames_read(self, total: int, seeds: Sequence[int]) -> list[int]:
        """The frames of videos of `total` frames that some term reads in some sample, in order."""
        read = (term.frames_read(total, seeds) for term in self.terms.values())
        return sorted({frame for samples in read for sample in samples for frame in sample})

    def scores(
        self,
        video: Tensor,
        prompts: list[str],
        seeds: Sequence[int],
        reference: Reference = _NOTHING,
        known: Mapping[str, Tensor] = _NONE,
    ) -> dict[str, Tensor]:
        """Each reward's own scores, and each loss, `(B,)`.

        Args:
            video: `(B, F, 3, H, W)` in [0, 1]; frames that no term reads can be anything.
            prompts: One a sample.
            seeds: One a sample; they decide which frames random samplers choose; equal samplers choose the same.
            reference: What losses compare with, and what else is known of the samples.
            known: Scores that need not be computed.
        """
        return {
            name: known[name]
            if name in known
            else check_scores(f"{term.kind} {name!r}", term.score(video, prompts, seeds, reference), len(prompts))
            for name, term in self.terms.items()
        }

    def values(
        self,
        scores: Mapping[str, Tensor],
        weights: Mapping[str, Sequence[float]] | None = None,
        statistics: Mapping[str, Statistics] | None = None,
    ) -> dict[str, Tensor]:
        """The value that each term adds to the objective of each sample, `(B,)`; the objective is their sum.

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

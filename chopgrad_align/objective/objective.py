"""Rewards and losses weighed together: where sign, weight, limits and reduction happen, once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ..common.errors import UsageError
from .losses import Loss
from .losses.protocol import compare
from .losses.protocol import frames_read as frames_compared
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
class Reference:
    """What a prediction is compared with; each part is there if the prediction has it.

    Attributes:
        target: The video that it should be, `(B, F, 3, H, W)` in [0, 1].
        mask: `(B, F, 1, H, W)`: 1 where something was to be made.
        latents: The predicted clean latents and the true ones, as the pipeline normalizes them.
        outputs: What the denoiser returned and what it should have returned.
    """

    target: Tensor | None = None
    mask: Tensor | None = None
    latents: tuple[Tensor, Tensor] | None = None
    outputs: tuple[Tensor, Tensor] | None = None


_NOTHING = Reference()
_NONE: Mapping[str, Tensor] = {}


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

    kind = "reward"
    reads_pixels = True

    def frames_read(self, total: int, seeds: Sequence[int]) -> list[list[int]]:
        """The frames of each sample that it reads, of videos of `total` frames."""
        return frames_read(self.reward, total, seeds)

    def score(self, video: Tensor, prompts: list[str], seeds: Sequence[int], reference: Reference) -> Tensor:
        """See `Objective.scores`."""
        return score(self.reward, video, prompts, seeds)

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
class LossTerm:
    """A pixel loss against the target; it should fall.

    Args:
        loss: Compares videos.
        weight: Positive.
    """

    loss: Loss
    weight: float = 1.0
    kind = "loss"
    normalize = False
    reads_pixels = True

    def frames_read(self, total: int, seeds: Sequence[int]) -> list[list[int]]:
        """As `Term.frames_read`."""
        return frames_compared(self.loss, total, seeds)

    def score(self, video: Tensor, prompts: list[str], seeds: Sequence[int], reference: Reference) -> Tensor:
        """The loss `(B,)`."""
        if reference.target is None:
            raise UsageError("a pixel loss needs data with a target: give a section data.clips")
        return compare(self.loss, video, reference.target, reference.mask, seeds)

    def value(self, score: Tensor, statistics: Statistics | None = None) -> Tensor:
        """As `Term.value`."""
        return -self.weight * score.to(torch.promote_types(score.dtype, torch.float32))


@dataclass(frozen=True)
class LatentTerm:
    """Mean squared error before the decoder; it should fall.

    Args:
        of: `latents`, of the predicted clean latents; `outputs`, of the denoiser's output, the usual diffusion loss.
        weight: Positive.
    """

    of: Literal["latents", "outputs"]
    weight: float = 1.0
    kind = "loss"
    normalize = False
    reads_pixels = False

    def frames_read(self, total: int, seeds: Sequence[int]) -> list[list[int]]:
        """As `Term.frames_read`: none."""
        return [[] for _ in seeds]

    def score(self, video: Tensor, prompts: list[str], seeds: Sequence[int], reference: Reference) -> Tensor:
        """The error `(B,)`, in float32."""
        pair = getattr(reference, self.of)
        if pair is None:
            modes = {"latents": "one_step or denoise", "outputs": "denoise"}[self.of]
            raise UsageError(f"a loss of {self.of} needs prediction.mode={modes}")
        predicted, true = pair
        return (predicted.float() - true.float()).square().flatten(1).mean(1)

    def value(self, score: Tensor, statistics: Statistics | None = None) -> Tensor:
        """As `Term.value`."""
        return -self.weight * score


@dataclass(frozen=True)
class Objective:
    """The sum of named terms, which should rise."""

    terms: dict[str, Term | LossTerm | LatentTerm] = field(default_factory=dict)

    @property
    def reads_pixels(self) -> bool:
        """Whether a video has to be decoded for it at all."""
        return any(term.reads_pixels for term in self.terms.values())

    @property
    def reads_latents(self) -> bool:
        """Whether the true latents are wanted."""
        return any(isinstance(term, LatentTerm) and term.of == "latents" for term in self.terms.values())

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
            reference: What losses compare with.
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

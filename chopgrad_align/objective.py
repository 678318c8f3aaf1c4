"""Several rewards weighed together: where sign, weight and reduction happen, once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .reward import Reward, check_scores


@dataclass(frozen=True)
class Term:
    """One reward and its weight; a negative weight lowers the reward's score."""

    reward: Reward
    weight: float = 1.0


@dataclass(frozen=True)
class Objective:
    """The weighted sum of named rewards."""

    terms: dict[str, Term]

    def __call__(self, video: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Score `video` `(B, F, C, H, W)` in [0, 1]; returns the sum `(B,)` and each term's own, unweighted `(B,)`."""
        scores = {
            name: check_scores(f"reward {name!r}", term.reward(video, prompts), len(video))
            for name, term in self.terms.items()
        }
        weighted = [self.terms[name].weight * score.float() for name, score in scores.items()]
        return torch.stack(weighted).sum(0), {name: score.detach() for name, score in scores.items()}

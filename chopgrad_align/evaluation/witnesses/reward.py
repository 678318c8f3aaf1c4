"""A reward as a witness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ...objective.reward import Reward, Samples
from ...objective.reward.protocol import check_scores, reads_audio, reads_sample, score
from .protocol import Witness


@dataclass(frozen=True)
class RewardWitness(Witness):
    """The score of a reward that is watched, and not trained on; without bounds, since its unit is its own.

    Args:
        reward: Scores videos.
        name: What messages call it.
    """

    reward: Reward
    name: str

    @property
    def module(self) -> nn.Module | None:
        """The reward, if it is a network."""
        return self.reward if isinstance(self.reward, nn.Module) else None

    @property
    def reads_sample(self) -> bool:
        """True if the reward asks for it."""
        return reads_sample(self.reward)

    @property
    def reads_audio(self) -> bool:
        """True if the reward asks for it."""
        return reads_audio(self.reward)

    def observe(self, video: Tensor, prompts: list[str], seeds: Sequence[int], sample: Samples | None = None) -> Tensor:
        """See `Witness`; the score."""
        return check_scores(f"witness {self.name!r}", score(self.reward, video, prompts, seeds, sample), len(prompts))

"""Captions: the texts that the model is told for a prompt; rewards are told the prompt itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..data.order import mix


@dataclass(frozen=True)
class Captions:
    """A trigger before every prompt, and prompts left out at random in training.

    Args:
        trigger: Words that call up what is trained; empty for none.
        dropout: Share of the videos of training whose prompt is the empty one instead, as models that are guided were
            trained (classifier-free guidance, arXiv 2207.12598).
    """

    trigger: str = ""
    dropout: float = 0.0

    def told(self, prompt: str) -> str:
        """The prompt with its trigger."""
        return f"{self.trigger} {prompt}" if self.trigger else prompt

    def drawn(self, prompt: str, *numbers: int) -> str:
        """The caption in training; the numbers seed the draw."""
        if self.dropout == 0:
            return self.told(prompt)
        draw = torch.rand((), generator=torch.Generator().manual_seed(mix(*numbers, 4))).item()
        return "" if draw < self.dropout else self.told(prompt)

    def all_told(self, prompt: str) -> list[str]:
        """Everything that can be told for a prompt."""
        return [self.told(prompt), *[""] * (self.dropout > 0)]

"""Shared parts of rewards of whole videos: one sample at a time, recomputed blocks."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chopgrad_align import SampledReward


class WholeVideoReward(SampledReward):
    """A reward that looks at a video as a whole; each sample alone, with its own prompt."""

    @abstractmethod
    def score_sample(self, frames: Tensor, prompt: str) -> Tensor:
        """Score the chosen `frames` `(n, 3, H, W)` in [0, 1] of one video, with its prompt; a scalar, or `(n,)`."""

    def score_video(self, video: Tensor, prompts: list[str]) -> Tensor:
        """Scores of `video` `(B, n, 3, H, W)` in [0, 1]; `(B,)`, or `(B, n)` of frames; at least float32."""
        scores = torch.stack([self.score_sample(frames, prompt) for frames, prompt in zip(video, prompts, strict=True)])
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


def evenly_spaced(total: int, count: int) -> list[int]:
    """Indices of `count` frames from the first to the last of `total`; a video with fewer repeats them evenly."""
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


class Recomputed(nn.Module):
    """A block of a transformer that keeps its input alone and runs again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.block, *args, use_reentrant=False, **kwargs)


def recompute_blocks(*stacks: nn.ModuleList) -> None:
    """Hold the activations of one block at a time, of the stacks of a model that is already loaded.

    transformers' own `gradient_checkpointing_enable` works in training mode alone; a reward is in eval mode.
    """
    for blocks in stacks:
        for i, block in enumerate(blocks):
            blocks[i] = Recomputed(block)

"""Shared parts of rewards of whole videos: one sample at a time, transformers' preprocessing, recomputed blocks."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chopgrad_align import SampledReward

from .preprocess import Preprocess


class WholeVideoReward(SampledReward):
    """A reward that looks at a video as a whole; each sample alone, with its own prompt."""

    @abstractmethod
    def score_sample(self, frames: Tensor, prompt: str) -> Tensor:
        """Score the chosen `frames` `(n, 3, H, W)` in [0, 1] of one video, with its prompt; returns a scalar."""

    def score_video(self, video: Tensor, prompts: list[str]) -> Tensor:
        """Scores of `video` `(B, n, 3, H, W)` in [0, 1]; `(B,)`, at least float32."""
        scores = torch.stack([self.score_sample(frames, prompt) for frames, prompt in zip(video, prompts, strict=True)])
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


def evenly_spaced(total: int, count: int) -> list[int]:
    """Indices of `count` frames from the first to the last of `total`; a video with fewer repeats them evenly."""
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


@dataclass(frozen=True)
class ResizeAndCrop:
    """The preprocessing of transformers' video processors: shortest side to a size, centre crop, normalise.

    Args:
        shortest: Pixels of the shortest side before the crop.
        crop: Height and width after it, not larger than `shortest`.
        interpolation, mean, std: As for `Preprocess`.
    """

    shortest: int
    crop: tuple[int, int]
    interpolation: Literal["bicubic", "bilinear"]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any) -> ResizeAndCrop:
        """With the settings of a transformers image or video processor."""
        shortest, crop = processor.size["shortest_edge"], processor.crop_size
        crop = (crop["height"], crop["width"])
        if shortest is None or max(crop) > shortest:
            raise ValueError(f"its processor resizes to {dict(processor.size)} and crops to {crop}")
        interpolation: Literal["bicubic", "bilinear"] = "bilinear" if processor.resample == 2 else "bicubic"
        return cls(shortest, crop, interpolation, tuple(processor.image_mean), tuple(processor.image_std))

    def __call__(self, frames: Tensor) -> Tensor:
        """`(N, 3, H, W)` in [0, 1] -> `(N, 3, *crop)`, normalised, at least float32."""
        size = [self.shortest * side // min(frames.shape[-2:]) for side in frames.shape[-2:]]
        resize = Preprocess((size[0], size[1]), "squash", self.interpolation, self.mean, self.std)
        # transformers rounds half a pixel down, torchvision to the even one.
        top, left = ((given - wanted) // 2 for given, wanted in zip(size, self.crop, strict=True))
        return resize(frames)[..., top : top + self.crop[0], left : left + self.crop[1]]


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

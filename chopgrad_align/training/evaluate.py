"""Score the same held-out pairs of prompt and seed, whatever the LoRA is at the moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.prompts import Condition
from ..data.video import write_video
from ..objective import Objective

_SEED_BASE = 1_000_000_000  # far from the seeds of training


@dataclass(frozen=True)
class Scores:
    """The objective of each pair, and the scores of each reward, in the order of the pairs."""

    total: list[float]
    terms: dict[str, list[float]]

    def row(self, step: int) -> dict[str, float]:
        total = torch.tensor(self.total, dtype=torch.float64)
        return {
            "step": step,
            "heldout/reward_mean": total.mean().item(),
            "heldout/reward_stderr": total.std().item() / len(total) ** 0.5,
            **{f"heldout/{name}": fmean(values) for name, values in self.terms.items()},
        }


def held_out_pairs(conditions: Sequence[Condition], count: int) -> list[tuple[Condition, int]]:
    """`count` pairs: the conditions in turn, each time with another seed."""
    return [(conditions[i % len(conditions)], _SEED_BASE + i) for i in range(count)]


def pipeline_inputs(pipe: Any, conditions: Sequence[Condition], seeds: Sequence[int]) -> dict[str, Any]:
    """Arguments of the pipeline's call for these videos: prompts, images and one generator each."""
    import inspect

    from diffusers.utils import load_image

    inputs: dict[str, Any] = {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
    if "prompt" in inspect.signature(type(pipe).__call__).parameters:
        inputs["prompt"] = [condition.prompt for condition in conditions]
    images = [load_image(str(condition.image)) for condition in conditions if condition.image is not None]
    if images:
        inputs["image"] = images[0] if len(images) == 1 else images
    return inputs


@torch.no_grad()
def evaluate(
    pipe: Any,
    call: dict[str, Any],
    objective: Objective,
    pairs: Sequence[tuple[Condition, int]],
    batch: int,
    share: tuple[int, int] = (0, 1),
    videos: tuple[Path, int, float] | None = None,
) -> dict[str, list[float]]:
    """Score this process's share of the pairs by each reward; random frames are those of the pair's seed.

    Args:
        share: This process's rank and the number of processes.
        videos: Folder, number and frames per second of the mp4 files to write, of the first pairs of all.
    """
    rank, world = share
    start, stop = (len(pairs) * k // world for k in (rank, rank + 1))
    scores: dict[str, list[float]] = {name: [] for name in objective.terms}
    with tqdm(total=stop - start, desc="held-out", leave=False, disable=rank != 0) as bar:
        for first in range(start, stop, batch):
            conditions, seeds = zip(*pairs[first : min(first + batch, stop)], strict=True)
            video: Tensor = pipe(**pipeline_inputs(pipe, conditions, seeds), **call, output_type="pt").frames
            for name, values in objective.scores(video, [c.prompt for c in conditions], seeds).items():
                scores[name] += values.tolist()
            for i, clip in enumerate(video):
                if videos is not None and first + i < videos[1]:
                    write_video(videos[0] / f"{first + i:03d}.mp4", clip.float().cpu().clamp(0, 1), videos[2])
            bar.update(len(conditions))
    return scores


def term_weights(objective: Objective, conditions: Sequence[Condition]) -> dict[str, list[float]]:
    """How much each term counts in each video."""
    return {name: [condition.weight_of(name) for condition in conditions] for name in objective.terms}

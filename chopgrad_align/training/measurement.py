"""Score the same held-out pairs of condition and seed, whatever the LoRA is at the moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.video import write_video
from ..objective.objective import Objective
from ..objective.terms import Reference
from ..sampling.predictions import Prediction
from .batches import Batches
from .methods.protocol import MicroBatch


@dataclass(frozen=True)
class Scores:
    """The prompt, the score of each term and how much it counts, for each pair in order."""

    prompts: list[str]
    terms: dict[str, list[float]]
    weights: dict[str, list[float]]


def heldout_row(step: int, totals: Sequence[float], terms: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """A row of metrics from the objective of each pair, and the scores of each term."""
    total = torch.tensor(totals, dtype=torch.float64)
    return {
        "step": step,
        "heldout/reward_mean": total.mean().item(),
        "heldout/reward_stderr": total.std().item() / len(total) ** 0.5,
        **{f"heldout/{name}": fmean(values) for name, values in terms.items()},
    }


@torch.no_grad()
def evaluate(
    pipe: Any,
    call: dict[str, Any],
    prediction: Prediction,
    objective: Objective,
    batches: Batches,
    pairs: int,
    batch: int,
    share: tuple[int, int] = (0, 1),
    videos: tuple[Path, int, float] | None = None,
) -> Scores:
    """Score this process's share of the held-out pairs; random frames are those of the pair's seed.

    Args:
        pairs: How many there are.
        batch: How many are predicted at a time.
        share: This process's rank and the number of processes.
        videos: Folder, number and frames per second of the mp4 files to write, of the first pairs of all; conditions
            and targets, if there are any, go into folders beside it, once.

    Returns:
        The scores of the share.
    """
    rank, world = share
    start, stop = (pairs * k // world for k in (rank, rank + 1))
    scores = Scores([], {name: [] for name in objective.terms}, {name: [] for name in objective.terms})
    with tqdm(total=stop - start, desc="held-out", leave=False, disable=rank != 0) as bar:
        for first in range(start, stop, batch):
            places = range(first, min(first + batch, stop))
            chosen = batches.held_out(places)
            video, reference = predict(pipe, call, prediction, chosen, objective.reads_latents)
            scores.prompts.extend(chosen.prompts)
            for name, values in objective.scores(video, chosen.prompts, chosen.frame_seeds, reference).items():
                scores.terms[name] += values.tolist()
                scores.weights[name] += (chosen.weights or {}).get(name, [1.0] * len(values))
            if videos is not None:
                folder, count, fps = videos
                shown = {folder: video} | {folder.with_name(role): clips for role, clips in chosen.videos.items()}
                for into, clips in shown.items():
                    for place, clip in zip(places, clips, strict=True):
                        path = into / f"{place:03d}.mp4"
                        if place < count and (into == folder or not path.exists()):
                            write_video(path, clip.expand(-1, 3, -1, -1).float().cpu().clamp(0, 1), fps)
            bar.update(len(places))
    return scores


def predict(
    pipe: Any, call: dict[str, Any], prediction: Prediction, batch: MicroBatch, latents: bool = False
) -> tuple[Tensor, Reference]:
    """Videos `(B, F, 3, H, W)` in [0, 1] by the pipeline's plain call, and what to compare them with."""
    with prediction.begin(pipe, batch.videos, batch.seeds, False, latents) as begun:
        video = pipe(**call | dict(batch.inputs) | dict(begun.inputs), output_type="pt").frames
    return video, begun.reference()

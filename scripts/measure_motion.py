"""Measure what a run on the embedded pipeline did to the motion of its videos, class of motion by class.

    python scripts/measure_motion.py --run runs/embedded
    python scripts/measure_motion.py --run runs/embedded --pairs 128

The held-out pairs of prompt and seed are sampled by the model without the run's LoRA and with it. Of both, the table
has the mean absolute difference of neighbouring frames, how often `video_text` finds the motion's words among all nine
in captions that differ in nothing else, and the scores of `video_text` and of `clip_score`, which sees single frames.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from embedded_stages.evaluate import motion_chosen
from torch import Tensor
from tqdm import tqdm

from chopgrad_align import Reward, load_config, load_lora, load_reward
from chopgrad_align.common.errors import UsageError, exit_on_usage_error
from chopgrad_align.data import procedural
from chopgrad_align.data.prompts import read_prompts
from chopgrad_align.evaluation.heldout import paired
from chopgrad_align.training.batches import call_inputs, held_out_seed
from chopgrad_align.training.models import load_pipeline

REWARDS = ("video_text", "clip_score")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run that has ended")
    parser.add_argument("--pairs", type=int, help="of held-out prompt and seed (default: the run's)")
    args = parser.parse_args(arguments)
    with exit_on_usage_error():
        measure(args.run, args.pairs)


@torch.no_grad()
def measure(run: Path, pairs: int | None) -> None:
    if not (run / "lora").exists():
        raise UsageError(f"--run: there is no {run / 'lora'}; give the folder of a run that has ended")
    config = load_config(run / "config.yaml")
    prompts, known = read_prompts(config.data.held_out), {scene.caption: scene for scene in procedural.all_scenes()}
    if unknown := [prompt for prompt in prompts if prompt not in known]:
        raise UsageError(f"--run: {unknown[0]!r} is no caption of the embedded pipeline's videos")
    scenes = [known[prompts[i % len(prompts)]] for i in range(pairs or config.validation.pairs)]
    rewards = {name: load_reward(name) for name in REWARDS}
    pipe = load_pipeline(config.model)
    pipe.set_progress_bar_config(disable=True)

    measured = {}
    for side in ("before", "after"):
        if side == "after":
            load_lora(pipe, run / "lora")
        videos = sample(pipe, config.model.call, [scene.caption for scene in scenes], side)
        measured[side] = [measures(*pair, rewards) for pair in zip(videos, scenes, strict=True)]
    print(table(scenes, measured["before"], measured["after"]))
    for name in REWARDS:
        print(f"{name}: {paired(*([row[name] for row in rows] for rows in measured.values()))}")


def sample(pipe: Any, call: dict[str, Any], prompts: list[str], title: str) -> list[Tensor]:
    """The video `(F, 3, H, W)` of each held-out pair."""
    videos: list[Tensor] = []
    for start in tqdm(range(0, len(prompts), 8), desc=title, leave=False):
        chosen = prompts[start : start + 8]
        seeds = [held_out_seed(start + i) for i in range(len(chosen))]
        videos += pipe(**call | call_inputs(pipe, chosen, seeds), output_type="pt").frames
    return videos


def measures(video: Tensor, scene: procedural.Scene, rewards: dict[str, Reward]) -> dict[str, float]:
    scores = {name: reward(video[None], [scene.caption]).item() for name, reward in rewards.items()}
    right = motion_chosen(rewards["video_text"], video, scene) == scene.motion
    return {"motion": video.diff(dim=0).abs().mean().item(), "word": float(right), **scores}


def table(
    scenes: Sequence[procedural.Scene], before: Sequence[dict[str, float]], after: Sequence[dict[str, float]]
) -> str:
    """Markdown: a row for each class of motion, and one for all."""
    lines = [
        "| motion | videos | frame difference before | after | ratio | motion's words right | after "
        "| video_text | after | clip_score | after |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for motion in (*procedural.MOTIONS, "all"):
        places = [i for i, scene in enumerate(scenes) if motion in (scene.motion, "all")]
        if not places:
            continue
        means = [
            [fmean(rows[i][name] for i in places) for rows in (before, after)]
            for name in ("motion", "word", "video_text", "clip_score")
        ]
        (slow, fast), words, *scores = means
        cells = [motion, f"{len(places)}", f"{slow:.4f}", f"{fast:.4f}", f"{fast / slow:.2f}"]
        cells += [f"{value:.0%}" for value in words] + [f"{value:.3f}" for pair in scores for value in pair]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

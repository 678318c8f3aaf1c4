"""Measure what a run on the embedded pipeline did to the motion of its videos, class of motion by class.

    python scripts/measure_motion.py --run runs/embedded
    python scripts/measure_motion.py --run runs/embedded --pairs 128 \\
        --lora runs/embedded/checkpoints/step-000040/lora.safetensors

The held-out pairs of prompt and seed are sampled by the model without the run's LoRA and with it. Of both, the table
has the mean absolute difference of neighbouring frames, how often `video_text` finds the motion's words among all nine
in captions that differ in nothing else, and the scores of `video_text` and of `clip_score`, which sees single frames.
`--sheet` draws six of the pairs before and after, frames in time: those whose score changed as the median pair's did.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from embedded_stages.evaluate import motion_chosen
from torch import Tensor
from tqdm import tqdm

from chopgrad_align import Reward, load_config, load_lora, load_reward
from chopgrad_align.common.errors import UsageError, exit_on_usage_error
from chopgrad_align.data import procedural
from chopgrad_align.data.order import mix
from chopgrad_align.data.prompts import read_prompts
from chopgrad_align.evaluation.heldout import paired
from chopgrad_align.evaluation.sheet import contact_sheet
from chopgrad_align.sampling.randomness import seeded
from chopgrad_align.training.batches import call_inputs, held_out_seed
from chopgrad_align.training.models import load_pipeline

REWARDS = ("video_text", "clip_score")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run that has ended")
    parser.add_argument("--lora", type=Path, help="instead of the run's own")
    parser.add_argument("--pairs", type=int, help="of held-out prompt and seed (default: the run's)")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="picture to write, of median pairs")
    args = parser.parse_args(arguments)
    with exit_on_usage_error():
        measure(args.run, args.lora or args.run / "lora", args.pairs, args.sheet)


@torch.no_grad()
def measure(run: Path, lora: Path, pairs: int | None, sheet: Path | None) -> None:
    if not lora.exists():
        raise UsageError(f"there is no {lora}; give the folder of a run that has ended as --run")
    config = load_config(run / "config.yaml")
    prompts, known = read_prompts(config.data.held_out), {scene.caption: scene for scene in procedural.all_scenes()}
    if unknown := [prompt for prompt in prompts if prompt not in known]:
        raise UsageError(f"--run: {unknown[0]!r} is no caption of the embedded pipeline's videos")
    scenes = [known[prompts[i % len(prompts)]] for i in range(pairs or config.validation.pairs)]
    rewards = {name: load_reward(name) for name in REWARDS}
    pipe = load_pipeline(config.model)
    pipe.set_progress_bar_config(disable=True)

    videos, measured = {}, {}
    for side in ("before", "after"):
        if side == "after":
            load_lora(pipe, lora)
        videos[side] = sample(pipe, config.model.call, [scene.caption for scene in scenes], side)
        measured[side] = [measures(*pair, rewards) for pair in zip(videos[side], scenes, strict=True)]
    print(table(scenes, measured["before"], measured["after"]))
    for name in REWARDS:
        print(f"{name}: {paired(*([row[name] for row in rows] for rows in measured.values()))}")
    if sheet:
        scores = [[row["video_text"] for row in rows] for rows in measured.values()]
        shown = median_places(scenes, [after - before for before, after in zip(*scores, strict=True)])
        chosen = {side: [of[i] for i in shown] for side, of in videos.items()}
        contact_sheet(chosen, [scenes[i].caption for i in shown]).save(sheet)


def sample(pipe: Any, call: dict[str, Any], prompts: list[str], title: str) -> list[Tensor]:
    """The video `(F, 3, H, W)` of each held-out pair."""
    videos: list[Tensor] = []
    for start in tqdm(range(0, len(prompts), 8), desc=title, leave=False):
        chosen = prompts[start : start + 8]
        seeds = [held_out_seed(start + i) for i in range(len(chosen))]
        inputs = call | call_inputs(pipe, chosen, seeds)
        with seeded(pipe, inputs["generator"], mix(*seeds)):
            videos += pipe(**inputs, output_type="pt").frames
    return videos


def measures(video: Tensor, scene: procedural.Scene, rewards: dict[str, Reward]) -> dict[str, float]:
    scores = {name: reward(video[None], [scene.caption]).item() for name, reward in rewards.items()}
    right = motion_chosen(rewards["video_text"], video, scene) == scene.motion
    return {"motion": video.diff(dim=0).abs().mean().item(), "word": float(right), **scores}


def median_places(scenes: Sequence[procedural.Scene], gains: Sequence[float], most: int = 6) -> list[int]:
    """The pairs whose gains are nearest to the median, one of a motion, in the order of the motions."""
    middle = median(gains)
    nearest: dict[str, int] = {}
    for i in sorted(range(len(gains)), key=lambda i: abs(gains[i] - middle)):
        nearest.setdefault(scenes[i].motion, i)
    return sorted(list(nearest.values())[:most], key=lambda i: procedural.MOTIONS.index(scenes[i].motion))


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

"""Stage `evaluate`: figures, a sample grid and the model card of what was exported."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from chopgrad_align.data import procedural
from chopgrad_align.objective.reward import Reward

from .clips import FRAMES, SIZE
from .denoiser import CALL
from .export import EMBEDDED


def psnr(video: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio of videos in [0, 1], in dB."""
    return -10 * math.log10((video - other).square().mean().item())


def reconstruction(vae: Any, clips: list[Tensor]) -> tuple[float, list[Tensor]]:
    """Mean PSNR over clips `(3, F, H, W)`, and the reconstructions."""
    outputs = []
    for clip in clips:
        latents = vae.encode(clip[None] * 2 - 1).latent_dist.mode()
        outputs.append((vae.decode(latents).sample[0] + 1) / 2)
    return sum(map(psnr, clips, outputs)) / len(clips), outputs


def real_clips(folder: Path) -> list[Tensor]:
    """Every video of a folder, cropped to a square and area-resized, in clips of the pipeline's length."""
    from chopgrad_align.data.video import read_video

    clips = []
    for path in sorted(folder.glob("*.mp4")):
        video, _ = read_video(path)
        height, width = video.shape[-2:]
        edge = min(height, width)
        top, left = (height - edge) // 2, (width - edge) // 2
        video = F.interpolate(video[:, :, top : top + edge, left : left + edge], (SIZE, SIZE), mode="area")
        clips += [video[i : i + FRAMES].transpose(0, 1) for i in range(0, len(video) - FRAMES + 1, FRAMES)]
    return clips


def retrieval(reward: Reward, videos: list[Tensor], scenes: list[procedural.Scene], choices: int = 32) -> float:
    """How often the reward scores a video `(F, 3, H, W)` highest with its own caption, of 32 held-out ones."""
    rng, right = random.Random("choices"), 0
    for video, scene in zip(videos, scenes, strict=True):
        captions = [scene.caption]
        while len(captions) < choices:
            other = procedural.random_scene(rng, held_out=True).caption
            if other not in captions:
                captions.append(other)
        scores = reward(video[None].expand(choices, -1, -1, -1, -1), captions)
        right += int(scores.argmax()) == 0
    return right / len(videos)


def motion_chosen(reward: Reward, video: Tensor, scene: procedural.Scene) -> str:
    """The motion with which the reward scores a video `(F, 3, H, W)` highest, the rest of its caption being right."""
    captions = [replace(scene, motion=motion).caption for motion in procedural.MOTIONS]
    scores = reward(video[None].expand(len(captions), -1, -1, -1, -1), captions)
    return procedural.MOTIONS[int(scores.argmax())]


def right_motions(reward: Reward, videos: Sequence[Tensor], scenes: Sequence[procedural.Scene]) -> float:
    """How often the reward chooses the motion of a video's caption among all nine."""
    pairs = list(zip(videos, scenes, strict=True))
    return sum(motion_chosen(reward, video, scene) == scene.motion for video, scene in pairs) / len(pairs)


@torch.no_grad()
def evaluate(work: Path, count: int, clips: Path | None = None) -> None:
    """Measure the exported folders as a user would load them; write figures, a sample grid and the model card."""
    from diffusers import DiffusionPipeline

    from chopgrad_align import load_reward
    from chopgrad_align.evaluation.sheet import contact_sheet

    pipe = DiffusionPipeline.from_pretrained(EMBEDDED / "pipeline", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    reward, video_reward = load_reward("clip_score", frames=4, frames_per_chunk=128), load_reward("video_text")
    rng = random.Random("evaluation")
    scenes = [procedural.random_scene(rng, held_out=True) for _ in range(count)]
    rendered = [procedural.render(scene, seed=10**9 + i, frames=FRAMES, size=SIZE) for i, scene in enumerate(scenes)]

    figures: dict[str, float] = {}
    figures["psnr_procedural_db"], _ = reconstruction(pipe.vae, rendered)
    if clips is not None:
        figures["psnr_real_db"], _ = reconstruction(pipe.vae, real_clips(clips))
    generated: list[Tensor] = []
    for start in tqdm(range(0, count, 8), desc="generate"):
        chosen = scenes[start : start + 8]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(chosen))]
        prompts = [scene.caption for scene in chosen]
        generated += list(pipe(prompts, generator=generators, **CALL, output_type="pt").frames)
    for kind, videos in {"rendered": [clip.transpose(0, 1) for clip in rendered], "generated": generated}.items():
        figures[f"retrieval_{kind}"] = retrieval(reward, videos, scenes)
        figures[f"video_retrieval_{kind}"] = retrieval(video_reward, videos, scenes)
        figures[f"motion_{kind}"] = right_motions(video_reward, videos, scenes)
    figures["videos"] = count
    figures["megabytes"] = sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) / 1e6

    print(json.dumps(figures, indent=2))
    (EMBEDDED / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    columns = {"rendered": [clip.transpose(0, 1) for clip in rendered[:8]], "generated": generated[:8]}
    contact_sheet(columns, [scene.caption for scene in scenes[:8]]).save(work / "samples.png")
    write_card(figures)


def write_card(figures: dict[str, float]) -> None:
    real_text = f"{figures['psnr_real_db']:.1f} dB PSNR" if "psnr_real_db" in figures else "not measured"
    lines = [
        "# The embedded pipeline and its rewards",
        "",
        "`pipeline/` is a diffusers folder (WanPipeline: AutoencoderKLWan in Wan 2.2's residual, patchified shape,",
        "WanTransformer3DModel, a UMT5 encoder with a word-level tokenizer): text to video, 17 frames at 64x64.",
        "`video_reward/` scores videos against captions (the reward `video_text`): it reads all frames in order and",
        "sees the motion. `reward/` is an open_clip folder that scores single frames (`clip_score`). All were trained",
        "from nothing by `scripts/build_embedded.py` on videos made by `chopgrad_align.data.procedural`; a tenth of",
        "the captions, chosen by a hash of their text, was held out. Licence: that of the package.",
        "",
        f"Measured by `scripts/build_embedded.py evaluate` on {figures['videos']} held-out captions. A caption is",
        "chosen among 32 held-out ones, a motion among the nine captions that differ in nothing else.",
        "",
        "| figure | value |",
        "|---|---|",
        f"| reconstruction of unseen procedural videos | {figures['psnr_procedural_db']:.1f} dB PSNR |",
        f"| reconstruction of real clips at the same size | {real_text} |",
        f"| right motion by `video_text`, rendered | {figures['motion_rendered']:.0%} |",
        f"| right motion by `video_text`, generated | {figures['motion_generated']:.0%} |",
        f"| right caption by `video_text`, rendered | {figures['video_retrieval_rendered']:.0%} |",
        f"| right caption by `video_text`, generated | {figures['video_retrieval_generated']:.0%} |",
        f"| right caption by `clip_score`, rendered | {figures['retrieval_rendered']:.0%} |",
        f"| right caption by `clip_score`, generated | {figures['retrieval_generated']:.0%} |",
        f"| size of all files | {figures['megabytes']:.1f} MB |",
        "",
        "Not for any use but tests, examples and benchmarks: it knows nine colours, eight shapes and nine motions.",
    ]
    (EMBEDDED / "README.md").write_text("\n".join(lines) + "\n")

"""Stage `latents`: the denoiser's training clips, encoded once."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from chopgrad_align.common.errors import UsageError
from chopgrad_align.common.files import whole_file
from chopgrad_align.data import procedural

from .clips import FRAMES, SIZE, training_scene
from .loop import trained
from .vae import make_vae

# Place and pose, which a caption does not say, differ less than they could: so small a model has other things to learn.
SPREAD = 0.3


@torch.no_grad()
def encode_latents(work: Path, count: int) -> None:
    """Encode the denoiser's training clips, in shards, so that an interrupted encoding goes on."""
    vae = trained(work, "vae", make_vae())
    shard = min(500, count)
    for start in tqdm(range(0, count, shard), desc="latents"):
        path = work / f"latents-{start:06d}.pt"
        if path.exists():
            continue
        means = []
        for first in range(start, start + shard, 20):
            indices = range(first, first + 20)
            clips = [procedural.render(training_scene(i), i, FRAMES, SIZE, spread=SPREAD) for i in indices]
            with torch.autocast("cpu", torch.bfloat16):
                means.append(vae.encode(torch.stack(clips) * 2 - 1).latent_dist.mode().half())
        with whole_file(path) as partial:
            torch.save(torch.cat(means), partial)


def load_latents(work: Path) -> Tensor:
    paths = sorted(work.glob("latents-*.pt"))
    if not paths:
        raise UsageError(f"{work} holds no latents; run the stage 'latents' first")
    return torch.cat([torch.load(path, weights_only=True) for path in paths])

"""The cases of the benchmark: a VAE, the latents of clips, and two losses on their pixels."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import UsageError
from ..data.buckets import Bucket, crop_box, cut
from ..data.footage import open_footage
from ..data.procedural import Scene, random_scene, render, texture_clip
from ..data.source import BadFile
from ..data.videofolder import read_folder
from ..decoding.decode import FrameLoss, decode
from ..decoding.decoders import decoder_of
from ..decoding.decoders.base import Decoder, Group
from ..training.models import check_pipeline

EMBEDDED = "embedded"
"""The name of the pipeline that comes with the package."""


@dataclass(frozen=True)
class Case:
    """The latents `(1, C, F', H', W')` of a clip and a loss on its pixels."""

    name: str
    latents: Tensor
    loss: FrameLoss


def folder_of(model: str) -> str:
    """The folder or hub id that a model's name means."""
    return str(Path(str(files("chopgrad_align"))) / "embedded" / "pipeline") if model == EMBEDDED else model


def load_vae(model: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The frozen VAE of a folder, its own or a pipeline's, or of a pipeline on the hub.

    Raises:
        UsageError: There is none.
    """
    from diffusers import AutoModel

    name = folder_of(model)
    own = (Path(name) / "config.json").is_file()
    if not own:
        check_pipeline(name, "--vae")
    try:
        vae = AutoModel.from_pretrained(name, subfolder=None if own else "vae", torch_dtype=dtype)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"--vae: cannot load a VAE from {name}; check the name and the network ({reason})") from error
    return vae.requires_grad_(False).eval().to(device)


def load_clips(folder: Path | None, count: int, frames: int, size: tuple[int, int]) -> dict[str, Tensor]:
    """Clips `(3, F, H, W)` in [0, 1] by name: of the first videos of a folder, or procedural ones of two kinds.

    Raises:
        UsageError: No videos in the folder, or one that is too short or cannot be read.
    """
    if folder is not None:
        sources = {row.name: row.sources["target"] for row in read_folder(folder)[:count]}
        return {name: _middle(source, name, frames, size) for name, source in sources.items()}
    clips = {f"scene {i}": render(scene, i, frames, max(size)) for i, scene in enumerate(scenes_of(count - count // 2))}
    clips |= {f"texture {i}": texture_clip(i, frames, max(size)) for i in range(count // 2)}
    return {name: fit(clip, size) for name, clip in clips.items()}


def _middle(source: Any, name: str, frames: int, size: tuple[int, int]) -> Tensor:
    """Consecutive frames from the middle of a video, since many begin with a title or in black."""
    try:
        footage = open_footage(source, name)
        length = round(footage.seconds * footage.fps)
        if length < frames:
            raise UsageError(f"{name} has {length} frames; --frames {frames} asks for more than that")
        first = (length - frames) // 2
        times = [(first + i) / footage.fps for i in range(frames)]
        return torch.cat([fit(frame[:, None], size) for frame in footage.frames_at(times)], 1)
    except BadFile as bad:
        raise UsageError(f"--clips: cannot read {bad}") from None


def scenes_of(count: int) -> list[Scene]:
    """Procedural scenes that no model of this package was trained on, the same every time."""
    rng = random.Random(0)
    return [random_scene(rng, held_out=True) for _ in range(count)]


def fit(clip: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of a clip `(3, F, h, w)`, as much of it as has the shape of `size`, resized to it."""
    frames, height, width = clip.shape[1:]
    box = crop_box(Bucket(frames, *size), height, width, "center", (0.5, 0.5))
    return torch.stack([cut(frame, box, *size) for frame in clip.unbind(1)], 1)


@torch.no_grad()
def encode(vae: Any, clip: Tensor) -> Tensor:
    """The latents `(1, C, F', H', W')` of a clip `(3, F, H, W)`.

    Raises:
        UsageError: The VAE does not give back so many frames of that size.
    """
    pixels = (clip[None] * 2 - 1).to(vae.device, vae.dtype)
    try:
        latents = vae.encode(pixels).latent_dist.mode()
        shape = tuple(decode(vae, latents).shape)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{type(vae).__name__} cannot encode a clip {tuple(pixels.shape)}: {reason}") from error
    if shape != tuple(pixels.shape):
        raise UsageError(
            f"{type(vae).__name__} makes pixels {shape} of a clip {tuple(pixels.shape)}; choose --frames and --size "
            "that it gives back, such as 4k + 1 frames"
        )
    return latents


def cases(vae: Any, clips: dict[str, Tensor]) -> Iterator[Case]:
    """Every clip with either loss."""
    for name, clip in clips.items():
        latents = encode(vae, clip)
        for kind, loss in losses(clip.to(latents)).items():
            yield Case(f"{name}, {kind}", latents, loss)


def losses(target: Tensor) -> dict[str, FrameLoss]:
    """Two frame-wise losses on pixels in [-1, 1]: distance to a target `(3, F, H, W)` in [0, 1], and colour.

    The first is what restoration is trained with, the second a reward that looks at whole frames: it falls as frames
    become more colourful (Hasler and Süsstrunk, "Measuring colourfulness in natural images", 2003).
    """
    count = target.shape[1]

    def pixel(pixels: Tensor, frames: slice) -> Tensor:
        wanted = target[None, :, frames] * 2 - 1
        return (pixels - wanted).square().mean((0, 1, 3, 4)).sum() / count

    def colour(pixels: Tensor, frames: slice) -> Tensor:
        red, green, blue = pixels.float().unbind(1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue], 1)  # (B, 2, f, H, W)
        spread = opponents.var((3, 4)).sum(1).add(1e-6).sqrt()
        shift = opponents.mean((3, 4)).square().sum(1).add(1e-6).sqrt()
        return -(spread + 0.3 * shift).mean(0).sum() / count

    return {"pixel": pixel, "colour": colour}


def units_of(vae: nn.Module, latents: Tensor) -> list[Group]:
    """The latents and frames that belong together: the groups of a recurrence, otherwise one latent frame each."""
    decoder = decoder_of(vae, latents)
    if isinstance(decoder, Decoder) and decoder.recurrent:
        return decoder.groups(latents)
    frames, count = decoder.spans(latents)[-1].stop, latents.shape[2]
    return [Group(slice(i, i + 1), slice(i * frames // count, (i + 1) * frames // count)) for i in range(count)]

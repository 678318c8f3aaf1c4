"""Knowledge of the data about each video of a micro-batch, as rewards and losses are told it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..objective.reward import Samples
from .methods.protocol import MicroBatch


def known_samples(
    batch: MicroBatch, device: torch.device, audio: Sequence[Tensor] = (), audio_rate: float | None = None
) -> Samples:
    """Everything that is known of the videos of a micro-batch.

    Pictures and videos of a call for one video, such as `image`, `video` or `reference_images`, are in it as the call
    has them; several pictures are a video if they are of one size, and otherwise left out.

    Args:
        batch: As the method is given it.
        device: Where the videos are scored.
        audio: Sound of each video, if it was asked for.
        audio_rate: Values a second of the sound.
    """
    count = len(batch.prompts)
    videos = {role: [*clips] for role, clips in batch.videos.items()}
    if count == 1:  # with media a call is for one video
        found = {name: _pictures(value) for name, value in batch.inputs.items()}
        videos |= {name: [video] for name, video in found.items() if video is not None}
    images = [video[0] for video in videos.pop("image", [])]
    return Samples(count, batch.fps, images, videos, audio, audio_rate, batch.rows).to(device)


def _pictures(value: Any) -> Tensor | None:
    """`(F, 3, H, W)` in [0, 1] of a picture, or of a list of pictures of one size; None of anything else."""
    from PIL import Image

    pictures = value if isinstance(value, list) else [value]
    if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
        return None
    if len({picture.size for picture in pictures}) > 1:
        return None
    return torch.stack([_pixels(picture) for picture in pictures])


def _pixels(picture: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255

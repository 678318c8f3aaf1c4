"""Videos to latents as a pipeline's denoiser sees them: the way back of the end of its call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...common.errors import UsageError
from ...data.cache import Cache
from ...data.cache import latents as latents_of_clip
from .protocol import Videos


@dataclass(frozen=True)
class Encoder:
    """Encoder of clips, with a cache.

    Args:
        cache: Keeps the latents of some roles.
        roles: Roles whose clips come again, so that keeping them pays.
    """

    cache: Cache | None = None
    roles: frozenset[str] = frozenset()

    def __call__(self, pipe: Any, videos: Videos, role: str) -> Tensor:
        """See `encode`."""
        return encode(pipe, videos[role], self.cache if role in self.roles else None)


def encode(pipe: Any, video: Tensor, cache: Cache | None = None) -> Tensor:
    """Latents that the pipeline's call takes as `latents` and would decode to (the reconstruction of) this video.

    Args:
        pipe: A Wan, CogVideoX or HunyuanVideo pipeline.
        video: `(B, F, 3, H, W)` in [0, 1].
        cache: Keeps the latents of each clip.

    Returns:
        In the pipeline's own layout and type: `(B, C, f, h, w)` in float32, for CogVideoX `(B, f, C, h, w)` in its
        transformer's.

    Raises:
        UsageError: Another pipeline.
    """
    family = known_family(pipe)
    # One by one: the encoder's activations of several clips need not exist at a time.
    latents = torch.stack([latents_of_clip(cache, pipe.vae, clip) for clip in video])
    return _NORMALIZED[family](pipe, latents.float())


def known_family(pipe: Any) -> str:
    """Name of the known family that a pipeline belongs to; a UsageError if it belongs to none."""
    for name in _NORMALIZED:
        if type(pipe).__name__.startswith(name):
            return name
    raise UsageError(
        f"prediction: {type(pipe).__name__} is not known to start from latents of a video; known are "
        f"{', '.join(_NORMALIZED)}. Use prediction.mode=sample"
    )


def frame_axis(pipe: Any) -> int:
    """Axis of frames in the latents of the pipeline's layout."""
    return 1 if type(pipe).__name__.startswith("CogVideoX") else 2


def continued(known: Tensor, latents: Tensor, axis: int) -> Tensor:
    """Latents whose first frames along the axis are replaced by the known ones."""
    count = known.shape[axis]
    return torch.cat([known, latents.narrow(axis, count, latents.shape[axis] - count)], axis)


def _standardized(pipe: Any, latents: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    return (latents - mean) / std


def _scaled(pipe: Any, latents: Tensor) -> Tensor:
    return latents * pipe.vae.config.scaling_factor


def _frames_first(pipe: Any, latents: Tensor) -> Tensor:
    return _scaled(pipe, latents).transpose(1, 2).to(pipe.transformer.dtype)  # its call does not cast them


_NORMALIZED = {"Wan": _standardized, "CogVideoX": _frames_first, "HunyuanVideo": _scaled}

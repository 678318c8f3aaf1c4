"""Videos to latents as a pipeline's denoiser sees them: the way back of the end of its call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError


def encode(pipe: Any, video: Tensor) -> Tensor:
    """Latents that the pipeline's call takes as `latents` and would decode to (the reconstruction of) this video.

    Args:
        pipe: A Wan, CogVideoX or HunyuanVideo pipeline.
        video: `(B, F, 3, H, W)` in [0, 1].

    Returns:
        In the pipeline's own layout and type: `(B, C, f, h, w)` in float32, for CogVideoX `(B, f, C, h, w)` in its
        transformer's.

    Raises:
        UsageError: Another pipeline.
    """
    family = next((name for name in _NORMALIZED if type(pipe).__name__.startswith(name)), None)
    if family is None:
        raise UsageError(
            f"prediction: {type(pipe).__name__} is not known to start from latents of a video; known are "
            f"{', '.join(_NORMALIZED)}. Use prediction.mode=sample"
        )
    weight = next(pipe.vae.parameters())
    pixels = (2 * video - 1).transpose(1, 2).to(weight.device, weight.dtype)
    with torch.no_grad():
        # One by one: the encoder's activations of several clips need not exist at a time.
        latents = torch.cat([pipe.vae.encode(clip).latent_dist.mode() for clip in pixels.split(1)])
    return _NORMALIZED[family](pipe, latents.float())


def frame_axis(pipe: Any) -> int:
    """Of the latents in the pipeline's layout."""
    return 1 if type(pipe).__name__.startswith("CogVideoX") else 2


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

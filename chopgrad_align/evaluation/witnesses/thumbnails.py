"""Thumbnails: what is kept of a video to tell how far it is from another one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SIDE, _FRAMES = 32, 16  # at most: 48 KiB a video


def thumbnails(video: Tensor) -> Tensor:
    """Frames evenly spaced in time, averaged down: `(B, F, 3, H, W)` in [0, 1] -> `(B, f, 3, h, w)`, bytes."""
    batch, count, _, height, width = video.shape
    chosen = torch.linspace(0, count - 1, min(count, _FRAMES)).round().long().to(video.device)
    scale = max(1.0, max(height, width) / _SIDE)
    size = (max(1, round(height / scale)), max(1, round(width / scale)))
    small = F.interpolate(video[:, chosen].flatten(0, 1).float(), size, mode="area")
    return (small.clamp(0, 1) * 255).round().byte().unflatten(0, (batch, -1))


def distance(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference of two thumbnails of one shape, in [0, 1]."""
    return (one.double() - other.double()).square().mean().sqrt().item() / 255

"""Curve (a): memory against the number of frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .cases import encode, losses
from .measure import peak_bytes
from .rows import Method


def measure_memory(
    vae: nn.Module,
    policies: Mapping[str, Method],
    others: Mapping[str, Method],
    lengths: Sequence[int],
    frames: int,
    size: tuple[int, int],
) -> Any:
    """The peak of decoding, loss and backward of one clip: of policies at each length, of all methods at `frames`."""
    frame_counts = sorted({*lengths, frames})
    peaks: dict[str, list[int | None]] = {name: [] for name in (*policies, *others)}
    for count in frame_counts:
        clip = torch.zeros(3, count, *size)
        latents = encode(vae, clip)
        loss = losses(clip.to(latents))["pixel"]
        for name, method in {**policies, **(others if count == frames else {})}.items():
            peaks[name].append(peak_bytes(method, vae, latents, loss))
    clip_at = frame_counts.index(frames)
    return {
        "frames": frame_counts,
        "peak_bytes": {name: peaks[name] for name in policies},
        "of_clip": {name: of[clip_at if name in policies else 0] for name, of in peaks.items()},
    }

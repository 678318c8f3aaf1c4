"""Conditions of the pipeline's call, made of roles of the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...common.arguments import nearest
from ...common.errors import UsageError
from .protocol import Videos


def arguments(columns: Mapping[str, str], videos: Videos) -> dict[str, Any]:
    """Arguments of a pipeline's call for a batch of clips.

    Args:
        columns: From the argument's name to a role of the data, such as `{"video": "degraded", "mask": "mask"}`.
        videos: See `Videos`.

    Returns:
        For each argument what video pipelines of diffusers take: a list of PIL frames for one clip, a list of such
        lists for several; of the role `image` a picture each. Masks are white where something is to be made.

    Raises:
        UsageError: The data has no such role.
    """
    given = {}
    for argument, role in columns.items():
        expect_role(f"columns.{argument}", role, videos)
        clips = [_pictures(video) for video in videos[role]]
        if role == "image":
            clips = [pictures[0] for pictures in clips]
        given[argument] = clips[0] if len(clips) == 1 else clips
    return given


def expect_role(key: str, role: str, roles: Iterable[str], data: str = "It") -> None:
    """Raise a UsageError if a role that `prediction.KEY` names is not among those of the data."""
    known = list(roles)
    if role not in known:
        raise UsageError(
            f"prediction.{key}: the data has no role {role!r}{nearest(role, known) or '.'} {data} has: "
            f"{', '.join(known) or 'none'}"
        )


def _pictures(video: Tensor) -> list[Any]:
    from PIL import Image

    pixels = (video.clamp(0, 1) * 255).round().to("cpu", torch.uint8).expand(-1, 3, -1, -1)
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in pixels]

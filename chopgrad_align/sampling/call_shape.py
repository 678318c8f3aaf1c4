"""Frames and size of a video among the arguments of a pipeline's call, which not all pipelines take or name alike."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

FRAMES = ("num_frames", "frames", "video_length")
"""Names of the number of frames: in most pipelines, in those of Sana, in Latte and its kind."""


def as_taken(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call for a clip, with its shape as this pipeline takes it.

    Args:
        pipe: A diffusers pipeline.
        call: Arguments, of which `num_frames`, `height` and `width` are the clip's.

    Returns:
        The same with `num_frames` under the pipeline's own name. What it does not take is left out: pipelines that edit
        a video make as many frames as they are given, and some take the size of an image.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    names = {"num_frames": next((name for name in FRAMES if name in parameters), "num_frames")}
    renamed = {names.get(key, key): value for key, value in call.items()}
    return {
        key: value for key, value in renamed.items() if key not in (*FRAMES, "height", "width") or key in parameters
    }


def frames_asked(call: Mapping[str, Any]) -> int | None:
    """The number of frames that a call asks for; None if it does not say."""
    return next((call[name] for name in FRAMES if call.get(name) is not None), None)

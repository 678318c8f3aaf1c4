"""Frames and sound in what a pipeline's call returns."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

from torch import Tensor

from ..common.errors import UsageError

_FRAMES, _SOUNDS = ("frames", "video"), ("audio", "sound")  # in diffusers; the last of each in Cosmos 3


def expect_output(pipe: Any, audio: bool = False) -> None:
    """Raise a UsageError if it can be known that a pipeline makes no frames, or no sound if there should be any."""
    outputs = [
        {field.name for field in dataclasses.fields(value)}
        for value in vars(sys.modules[type(pipe).__module__]).values()
        if inspect.isclass(value) and value.__name__.endswith("PipelineOutput") and dataclasses.is_dataclass(value)
    ]
    for wanted, name, needed in ((_FRAMES, "videos", True), (_SOUNDS, "sound", audio)):
        if needed and outputs and not any(output & {*wanted} for output in outputs):
            raise UsageError(f"rollout: {type(pipe).__name__} makes no {name}")


def frames_of(pipe: Any, output: Any, output_type: str = "pt") -> Tensor:
    """Frames `(B, F, C, H, W)` in [0, 1] of a call with `output_type="pt"`; with another one, what was returned.

    They are `output.frames` in nearly all cases. Cosmos 3 and Sana WM return one clip without B, and LTX with several
    prompts what its decoder returned.
    """
    frames = next(getattr(output, name) for name in _FRAMES if hasattr(output, name))
    if output_type != "pt":
        return frames
    if hasattr(pipe, "vae_decode_tiled"):
        frames = pipe.video_processor.postprocess_video(frames, "pt")
    return frames if frames.ndim == 5 else frames[None]


def sound_of(pipe: Any, output: Any) -> Tensor:
    """Sound as a pipeline returns it, for LTX-2 `(B, channels, samples)` in [-1, 1].

    Raises:
        UsageError: The call made none.
    """
    sound = next((getattr(output, name) for name in _SOUNDS if getattr(output, name, None) is not None), None)
    if sound is None:
        raise UsageError(f"rollout: audio=True: this call of {type(pipe).__name__} makes no sound; ask it for some")
    return sound

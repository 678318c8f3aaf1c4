"""Frames and sound in what a pipeline's call returns."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..common.errors import UsageError

_FRAMES, _SOUNDS = ("frames", "video"), ("audio", "sound")  # in diffusers; the last of each in Cosmos 3

# The component that makes the sound of LTX-2, Cosmos 3 and Kandinsky 6, and where its config has the rate.
_SOUND_RATES = (
    ("vocoder", "output_sampling_rate"),
    ("sound_tokenizer", "sampling_rate"),
    ("audio_vae", "sample_rate"),
)


def expect_frames(pipe: Any) -> None:
    """Raise a UsageError if it can be known that a pipeline makes no frames."""
    _expect(pipe, _FRAMES, "videos")


def expect_sound(pipe: Any, call: Mapping[str, Any]) -> None:
    """Raise a UsageError if it can be known that a pipeline makes no sound in a call."""
    _expect(pipe, _SOUNDS, "sound")
    parameters = inspect.signature(type(pipe).__call__).parameters
    for switch in ("enable_sound", "sample_audio"):  # of Cosmos 3 and of Kandinsky 6
        if switch in parameters and call.get(switch, parameters[switch].default) is False:
            raise UsageError(f"rollout: audio=True: {type(pipe).__name__} makes sound with {switch}=True: add it")


def _expect(pipe: Any, wanted: tuple[str, ...], name: str) -> None:
    outputs = [
        {field.name for field in dataclasses.fields(value)}
        for value in vars(sys.modules[type(pipe).__module__]).values()
        if inspect.isclass(value) and value.__name__.endswith("PipelineOutput") and dataclasses.is_dataclass(value)
    ]
    if outputs and not any(output & {*wanted} for output in outputs):
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


def sound_of(output: Any) -> Tensor:
    """Sound as a pipeline returns it, for LTX-2 `(B, channels, samples)` in [-1, 1]."""
    return next(getattr(output, name) for name in _SOUNDS if hasattr(output, name))


def sound_rate(pipe: Any) -> float | None:
    """Values a second of the sound that a pipeline makes; None for one that makes none."""
    for name, key in _SOUND_RATES:
        if key in getattr(pipe.components.get(name), "config", {}):
            return pipe.components[name].config[key]
    return None

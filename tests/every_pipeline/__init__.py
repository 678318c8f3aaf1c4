"""A tiny pipeline for every class of diffusers that makes videos."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import warnings

from . import cogvideox, cosmos, hunyuan, kandinsky, ltx, ltx2, sana, transformers, unets, wan
from .entry import Entry

__all__ = ["ENTRIES", "NOT_SAMPLERS", "Entry", "video_classes"]

_FAMILIES = (cogvideox, cosmos, hunyuan, kandinsky, ltx, ltx2, sana, transformers, unets, wan)
ENTRIES: dict[str, Entry] = {name: entry for family in _FAMILIES for name, entry in family.ENTRIES.items()}
"""By the name of the class; of its further modes, by `class/mode`."""

_ZERO = "makes images of an image model, as a numpy array, with frames warped between its steps"
NOT_SAMPLERS = {
    "LTXLatentUpsamplePipeline": "enlarges latents by one call of a network; nothing is sampled",
    "LTX2LatentUpsamplePipeline": "enlarges latents by one call of a network; nothing is sampled",
    "LTX2VideoDiffusionDecodePipeline": "decodes latents that another pipeline has made",
    "LTX2DFRTemporalRefinePipeline": "refines latents and keyframes that another pipeline has made",
    "TextToVideoZeroPipeline": _ZERO,
    "TextToVideoZeroSDXLPipeline": _ZERO,
}
"""Classes without an entry, and why."""


def video_classes() -> dict[str, type]:
    """The pipelines of the installed diffusers that make videos, which their output or their name says."""
    import diffusers

    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in dir(diffusers):
            cls = getattr(diffusers, name) if "Pipeline" in name else None
            if inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline) and _makes_videos(cls):
                found[name] = cls
    return found


def _makes_videos(cls: type) -> bool:
    from diffusers.utils import BaseOutput

    outputs = [
        field.name
        for value in vars(sys.modules[cls.__module__]).values()
        if inspect.isclass(value) and issubclass(value, BaseOutput) and dataclasses.is_dataclass(value)
        for field in dataclasses.fields(value)
        if value.__name__.endswith("PipelineOutput")
    ]
    return "Video" in cls.__name__ or bool({"frames", "video"} & set(outputs))

"""All curves in one run, as one object that can be written as JSON."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.errors import UsageError
from ..decoding.backprop import Truncated
from ..decoding.decode import FrameLoss
from .cases import cases, encode, folder_of, load_clips, load_vae, losses
from .error import measure_error, measure_lora_error
from .influence import measure_influence
from .memory import measure_memory
from .options import COMPILED, option_rows
from .peers import PEERS
from .rows import EXACT, POLICIES, REFERENCE, Method, Row
from .speed import measure_speed


@dataclass(frozen=True)
class Settings:
    """Choice of what to measure, and how often. Names are those of the script's options."""

    vae: str
    """Folder, hub id or "embedded"."""
    pipeline: str | None
    """Pipeline of the LoRA's curve; `None` leaves it out."""
    clips: str | None
    """Folder of videos; `None` for procedural ones."""
    count: int
    """Clips, and prompts for the LoRA."""
    frames: int
    size: tuple[int, int]
    time_sizes: tuple[tuple[int, int], ...]
    memory_frames: tuple[int, ...]
    distances: tuple[int, ...]
    probes: int
    repetitions: int
    options: tuple[str, ...]
    dtype: str
    device: str

    def __post_init__(self) -> None:
        least = {"count": 1, "frames": 1, "probes": 1, "repetitions": 2}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise UsageError(f"--{name} {getattr(self, name)}: expected {minimum} or more")


def benchmark(settings: Settings, policies: Mapping[str, Method] = POLICIES) -> dict[str, Any]:
    """Measure everything.

    Raises:
        UsageError: Models or clips that cannot be read, or a size that the VAE does not give back.
    """
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine has none that torch can use; give --device cpu")
    vae = load_vae(settings.vae, dtype, device)
    lora = _with_lora(settings, folder_of(settings.pipeline)) if settings.pipeline else None
    folder = Path(settings.clips) if settings.clips else None
    clips = load_clips(folder, settings.count, settings.frames, settings.size)
    latents = {name: encode(vae, clip) for name, clip in clips.items()}
    timed = {shape: _first_clip(vae, settings, folder, shape) for shape in settings.time_sizes}

    by_distance: dict[str, Method] = {row.name: row for row in map(Row, map(Truncated, settings.distances))}
    compared: dict[str, Method] = {REFERENCE: policies[REFERENCE], **by_distance, EXACT: policies[EXACT]}
    options = option_rows(vae, settings.options)
    counted = {name: row for name, row in options.items() if COMPILED not in name}  # its code allocates unseen
    methods = {**policies, **options, **PEERS}
    results: dict[str, Any] = {"machine": machine(device), "settings": asdict(settings)}
    _say("memory")
    results["memory"] = measure_memory(
        vae, policies, {**counted, **PEERS}, settings.memory_frames, settings.frames, settings.size
    )
    _say("influence")
    results["influence"] = measure_influence(vae, latents, settings.probes)
    _say("error of latents")
    results["error"] = measure_error(vae, {**compared, **methods}, cases(vae, clips))
    if lora:
        _say("error of LoRA")
        results["lora_error"] = measure_lora_error(*lora, compared, settings.count)
    results["speed"] = {}
    for (height, width), (z, loss) in timed.items():
        name = f"{height}x{width}"
        _say(f"time, {name}")
        results["speed"][name] = measure_speed(vae, methods, z, loss, settings.repetitions)
    return results


def _first_clip(
    vae: Any, settings: Settings, folder: Path | None, size: tuple[int, int]
) -> tuple[torch.Tensor, FrameLoss]:
    """The latents of the first clip at a size, and the pixel loss to it."""
    (clip,) = load_clips(folder, 1, settings.frames, size).values()
    latents = encode(vae, clip)
    return latents, losses(clip.to(latents))["pixel"]


def _with_lora(settings: Settings, folder: str) -> tuple[Any, list[nn.Parameter], dict[str, Any]]:
    """The pipeline, the weights of a LoRA on it, and the arguments of its call."""
    from ..sampling.rollout import check_call
    from ..training.config import Model
    from ..training.lora import add_lora, lora_config, lora_parameters
    from ..training.models import load_pipeline

    defaults = Path(folder) / "call_defaults.json"
    call = json.loads(defaults.read_text(encoding="utf-8")) if defaults.is_file() else {}
    call |= {"num_frames": settings.frames, "height": settings.size[0], "width": settings.size[1]}
    model: Any = Model  # a type checker does not see the __init__ that pydantic makes
    named = model(name=folder, dtype=settings.dtype, vae_dtype=settings.dtype)
    pipe = load_pipeline(named).to(settings.device)
    check_call(pipe, call)
    config = lora_config(rank=16, alpha=None, targets=["to_q", "to_k", "to_v", "to_out.0"], dropout=0.0)
    parameters = lora_parameters(add_lora(pipe, config))
    torch.manual_seed(0)
    for parameter in parameters:  # not as at the start of training, when one of the two factors has no gradient
        torch.nn.init.normal_(parameter, std=0.02)
    return pipe, parameters, call


def machine(device: torch.device) -> dict[str, Any]:
    """The machine that the figures were measured on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": name,
        "cuda": device.type == "cuda",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} measuring {what}", flush=True)

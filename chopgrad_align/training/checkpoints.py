"""A run's state as files: `lora.safetensors`, `optimizer.pt` and `progress.json` of one checkpoint."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

WEIGHTS = "lora.safetensors"
_OPTIMIZER, _PROGRESS = "optimizer.pt", "progress.json"


def write_weights(weights: dict[str, Tensor], folder: Path) -> None:
    """Write the trained weights alone into a folder."""
    # Through Python's own files, whose errors say what is wrong with the disk; safetensors' do not.
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(weights))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the trained weights of a checkpoint, on the CPU."""
    return safetensors.torch.load_file(folder / WEIGHTS)


def write_state(state: dict[str, Any], folder: Path) -> None:
    """Write what `TrainState.state_dict` returned into an empty folder."""
    write_weights(state["weights"], folder)
    buffer = io.BytesIO()
    torch.save({"optimizer": state["optimizer"], "schedule": state["schedule"]}, buffer)
    (folder / _OPTIMIZER).write_bytes(buffer.getvalue())
    (folder / _PROGRESS).write_text(json.dumps(state["progress"]))


def read_state(folder: Path) -> dict[str, Any]:
    """Read what `write_state` wrote, on the CPU."""
    return {
        "weights": read_weights(folder),
        **torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True),
        "progress": json.loads((folder / _PROGRESS).read_text()),
    }

"""Several trained models on one pipeline, of which one is in use at a time."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .lora import load_lora
from .lora_files import lora_file
from .modules import MODULES_NAME, fitted_modules


def trained_file(path: Path) -> Path:
    """The file of trained weights that a path means: itself, or a folder's LoRA or trained modules.

    Raises:
        UsageError: There is none.
    """
    modules = path / MODULES_NAME
    return modules if modules.is_file() else lora_file(path)


class TrainedModels:
    """What runs have trained, a LoRA or whole modules each, loaded into one pipeline.

    Args:
        pipe: Without a LoRA.
        files: Of each its `trained_file`; None is the model as it is.
        partial: Whether to leave out what of a LoRA does not fit.

    Raises:
        UsageError: Weights that do not fit the pipeline.
    """

    def __init__(self, pipe: Any, files: Mapping[str, Path | None], partial: bool = False) -> None:
        self._pipe = pipe
        # First, since a LoRA changes the names of weights.
        self._modules = {
            name: fitted_modules(pipe, file) for name, file in files.items() if file and file.name == MODULES_NAME
        }
        changed = {weight for fitted in self._modules.values() for weight, _ in fitted}
        self._base = [(weight, weight.detach().cpu().clone()) for weight in changed]
        loras = {name: file for name, file in files.items() if file and name not in self._modules}
        self._adapters = {name: f"method_{i}" for i, name in enumerate(loras)}  # peft takes no dots in its names
        for name, file in loras.items():
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what is wanted
                load_lora(pipe, file, self._adapters[name], partial=partial)

    def use(self, name: str) -> None:
        """Make the pipeline the model of this name."""
        for weight, value in [*self._base, *self._modules.get(name, ())]:
            weight.data.copy_(value)
        if name in self._adapters:
            self._pipe.enable_lora()
            self._pipe.set_adapters(self._adapters[name])
        elif self._adapters:
            self._pipe.disable_lora()

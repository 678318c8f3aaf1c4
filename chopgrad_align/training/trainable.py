"""Trainables: the weights that are trained, how they are kept, and how a user gets them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .lora import add_lora, load_lora_state, lora_parameters, lora_state, save_lora


@runtime_checkable
class Trainable(Protocol):
    """The part of a pipeline that is trained; everything else of it is frozen.

    Attributes:
        parameters: The trained weights, in an order that is always the same.
    """

    parameters: list[nn.Parameter]

    def train(self) -> None:
        """Put layers into the mode in which they are trained."""
        ...

    def eval(self) -> None:
        """Put layers into the mode in which they are measured."""
        ...

    def base(self) -> AbstractContextManager[None]:
        """Make the pipeline, within the context, the one that it was before it had anything trained."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights by name, on the CPU."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned."""
        ...

    def export(self, folder: Path) -> None:
        """Write the weights as diffusers reads them."""
        ...


class LoraOnDenoisers:
    """A LoRA on the layers of a pipeline's denoisers.

    Args:
        pipe: Frozen, and given the LoRA, here.
        adapter: Rank, scale, layers and dropout.
        only: Names of the denoisers that have it; default: all.
    """

    def __init__(self, pipe: Any, adapter: LoraConfig, only: Collection[str] | None = None) -> None:
        self._pipe, self._adapter = pipe, adapter
        self.denoisers = add_lora(pipe, adapter, only)
        self.parameters = lora_parameters(self.denoisers)

    def train(self) -> None:
        """Switch dropout on, if there is any; other layers of a frozen model stay as in inference."""
        for denoiser in self.denoisers.values():
            denoiser.train(self._adapter.lora_dropout > 0)

    def eval(self) -> None:
        """Switch dropout off."""
        for denoiser in self.denoisers.values():
            denoiser.eval()

    @contextmanager
    def base(self) -> Iterator[None]:
        """Leave the LoRA out within the context."""
        layers = [part for d in self.denoisers.values() for part in d.modules() if isinstance(part, BaseTunerLayer)]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def state_dict(self) -> dict[str, Tensor]:
        """See `Trainable`; names are diffusers', `component.layer.lora_A.weight`."""
        return lora_state(self.denoisers)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Trainable`."""
        load_lora_state(self.denoisers, state)

    def export(self, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors`, which plain `pipe.load_lora_weights(folder)` reads."""
        save_lora(self._pipe, self.denoisers, self._adapter, folder)

"""Kinds of quantisation of frozen weights, by the libraries that diffusers and transformers load them with.

A weight is quantised as it is read, so that no more than a file of whole weights is there at a time.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

from ..common.arguments import nearest
from ..common.errors import UsageError
from .lora_files import DENOISERS
from .quantized_linear import recompute_weights


class Quantization(Protocol):
    """A way to store the weights of linear layers in fewer bits."""

    @property
    def package(self) -> str:
        """The library that it needs."""
        ...

    @property
    def weight(self) -> str:
        """Name of the class of its weights."""
        ...

    @property
    def keeps_float32_layers(self) -> bool:
        """True if those layers of a text encoder stay whole that transformers wants in float32, as T5's `wo`.

        Of a denoiser, diffusers leaves such layers alone in any case.
        """
        ...

    def settings(self, library: Any, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of `from_pretrained` of diffusers or transformers, for a model that computes in a type."""
        ...

    def loadable(self) -> AbstractContextManager[None]:
        """Let diffusers, within the context, load it on the CPU too."""
        ...

    def dequantized(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The whole weight `(out, in)`, in a type."""
        ...

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a stored weight `(rows, columns)`."""
        ...


@dataclass(frozen=True)
class NormalFloat4:
    """Four bits a weight, at quantiles of the normal distribution, in blocks of 64 whose scales have eight bits.

    QLoRA's (arXiv 2305.14314, with double quantisation), by bitsandbytes.
    """

    package: str = "bitsandbytes"
    weight: str = "Params4bit"
    keeps_float32_layers: bool = True

    def settings(self, library: Any, dtype: torch.dtype) -> dict[str, Any]:
        """See `Quantization`."""
        config = library.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        # It packs weights fast on a GPU, where they then stay.
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        return {"quantization_config": config, "device_map": {"": device}}

    @contextmanager
    def loadable(self) -> Iterator[None]:
        """See `Quantization`."""
        from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

        # It asks for a GPU, which bitsandbytes no longer needs.
        with mock.patch.object(BnB4BitDiffusersQuantizer, "validate_environment"):
            yield

    def dequantized(self, weight: Any, dtype: torch.dtype) -> Tensor:
        """See `Quantization`."""
        from bitsandbytes.functional import dequantize_4bit

        whole: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return whole.to(dtype)

    def nbytes(self, rows: int, columns: int) -> int:
        """See `Quantization`."""
        blocks = math.ceil(rows * columns / 64)
        tables = 4 * (16 + 256 + 1)  # the values of four and of eight bits, and the mean of the scales
        return math.ceil(rows * columns / 2) + blocks + 4 * math.ceil(blocks / 256) + tables


@dataclass(frozen=True)
class EightBits:
    """Eight bits a weight and a scale a row, by torchao; activations stay as they are.

    Attributes:
        config: Name of torchao's class of its settings.
        row: Bytes beside the weights of a row.
    """

    config: str
    weight: str
    row: int
    package: str = "torchao"
    keeps_float32_layers: bool = False

    def settings(self, library: Any, dtype: torch.dtype) -> dict[str, Any]:
        """See `Quantization`."""
        from torchao import quantization

        return {"quantization_config": library.TorchAoConfig(getattr(quantization, self.config)())}

    def loadable(self) -> AbstractContextManager[None]:
        """See `Quantization`."""
        return nullcontext()

    def dequantized(self, weight: Any, dtype: torch.dtype) -> Tensor:
        """See `Quantization`."""
        whole: Tensor = weight.dequantize(dtype)
        return whole

    def nbytes(self, rows: int, columns: int) -> int:
        """See `Quantization`."""
        return rows * (columns + self.row)


KINDS: Mapping[str, Quantization] = {
    "nf4": NormalFloat4(),
    "int8": EightBits("Int8WeightOnlyConfig", "Int8Tensor", row=5),  # scale, zero point
    "fp8": EightBits("Float8WeightOnlyConfig", "Float8Tensor", row=4),
}
"""Every kind, by its name in a config."""


def check_quantization(quantize: str | Mapping[str, str]) -> None:
    """Raise a UsageError for a kind, of the denoisers or of some components, whose library is not installed."""
    for kind in [quantize] if isinstance(quantize, str) else quantize.values():
        package = KINDS[kind].package
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"model.quantize: {kind} needs {package}, which is not installed: "
                "pip install 'chopgrad-align[quantize]'"
            )


def kinds_by_component(quantize: str | Mapping[str, str], components: Collection[str]) -> dict[str, str]:
    """The kind of each component of a pipeline that is to be quantised; one kind alone is that of the denoisers.

    Raises:
        UsageError: The pipeline has no such component.
    """
    if isinstance(quantize, str):
        return {name: quantize for name in DENOISERS if name in components}
    if absent := sorted(quantize.keys() - components):
        raise UsageError(f"model.quantize.{absent[0]}: there is no such component{nearest(absent[0], components)}")
    return dict(quantize)


def read_quantized(kind: str, library: str, model: str, source: str, dtype: torch.dtype, **place: Any) -> Any:
    """Load a frozen model with the weights of its linear layers quantised.

    Those that its class keeps in float32 stay so, and so do all that the library leaves out, such as the last layer of
    a text encoder.

    Args:
        kind: A key of `KINDS`.
        library: diffusers or transformers.
        model: Class in it.
        source: Folder or hub id.
        dtype: Of what is not quantised, and of what is computed.
        place: Further arguments of its `from_pretrained`, such as subfolder.

    Raises:
        UsageError: A class of another library.
    """
    if library not in ("diffusers", "transformers"):
        raise UsageError(f"model.quantize: expected a model of diffusers or transformers, got {library}'s {model}")
    module, quantization = importlib.import_module(library), KINDS[kind]
    settings = quantization.settings(module, dtype)
    with quantization.loadable():
        loaded = getattr(module, model).from_pretrained(source, dtype=dtype, **settings, **place)
    loaded.requires_grad_(False)
    recompute_weights(loaded, quantization.weight, quantization.dequantized)
    return loaded

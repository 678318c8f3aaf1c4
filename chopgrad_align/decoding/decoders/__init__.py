"""The known decoders. Each file adapts one family to `base.Decoder`; none is imported before it is needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from ...common.errors import UsageError
from .base import Decoder, Tiled

Make = Callable[..., Decoder | Tiled]

_KNOWN: dict[str, str | Make] = {
    "AutoencoderKL": "image:image",
    "AutoencoderKLAllegro": "allegro:AllegroTiles",
    "AutoencoderKLCogVideoX": "cogvideox:cogvideox",
    "AutoencoderKLCosmos": "cosmos:CosmosDecoder",
    "AutoencoderKLHunyuanVideo": "hunyuan:hunyuan_video",
    "AutoencoderKLHunyuanVideo15": "hunyuan:hunyuan_video15",
    "AutoencoderKLKVAEVideo": "kvae:KVAEVideoDecoder",
    "AutoencoderKLLTX2Video": "ltx:ltx2_video",
    "AutoencoderKLLTXVideo": "ltx:ltx_video",
    "AutoencoderKLMagvit": "magvit:magvit",
    "AutoencoderKLMochi": "mochi:mochi",
    "AutoencoderKLQwenImage": "wan:qwen_image",
    "AutoencoderKLTemporalDecoder": "temporal:TemporalDecoder",
    "AutoencoderKLWan": "wan:wan",
    "Kandinsky6SRVAE": "kandinsky6:Kandinsky6SRDecoder",
}


def register_decoder(vae_class: type[nn.Module], decoder: Make) -> None:
    """Make a VAE class known: `decoder(vae, latents, **decode_kwargs)` must return a `Decoder` or a `Tiled` one.

    It is called for every decoding, with the latents, since whether a model uses tiles depends on their size.
    """
    _KNOWN[vae_class.__name__] = decoder


def known_names() -> list[str]:
    """The names of the known VAE classes."""
    return sorted(_KNOWN)


def decoder_of(vae: nn.Module, latents: Tensor, **decode_kwargs: Any) -> Decoder | Tiled:
    """The adapter of a VAE, also of a subclass of a known one.

    Raises:
        UsageError: The class is not known, or the latents or arguments do not fit it.
    """
    make = known_decoder(vae)
    try:
        inspect.signature(make).bind(vae, latents, **decode_kwargs)
    except TypeError as error:
        accepted = [*inspect.signature(make).parameters][2:]
        raise UsageError(
            f"decode: {type(vae).__name__}: {error}; beside latents it takes {', '.join(accepted) or 'nothing'}"
        ) from None
    return make(vae, latents, **decode_kwargs)


def known_decoder(vae: nn.Module) -> Make:
    """The function that makes the adapter of a VAE; a UsageError if its class is not known."""
    for cls in type(vae).__mro__:
        if (known := _KNOWN.get(cls.__name__)) is not None:
            if not isinstance(known, str):
                return known
            module, name = known.split(":")
            return getattr(import_module(f".{module}", __name__), name)
    raise UsageError(
        f"decode: no decoder is known for {type(vae).__name__}; known are {', '.join(known_names())}. "
        "To add one, subclass chopgrad_align.Decoder and pass it to chopgrad_align.register_decoder"
    )


def expect_latents(vae: nn.Module, latents: Tensor, *layouts: str) -> None:
    """Check the number of dimensions of latents; a layout is spelled like "BCFHW"."""
    if latents.dim() not in {len(layout) for layout in layouts} or not latents.is_floating_point():
        shapes = " or ".join(f"({', '.join(layout)})" for layout in layouts)
        raise UsageError(
            f"decode: latents for {type(vae).__name__} must be a floating-point tensor of shape {shapes}, "
            f"got {latents.dtype} of shape {tuple(latents.shape)}"
        )
    if 0 in latents.shape:
        raise UsageError(f"decode: latents are empty, shape {tuple(latents.shape)}")

"""The known decoders. Each file adapts one family to `base.Decoder`; none is imported before it is needed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from ..errors import UsageError
from .base import Decoder

_KNOWN: dict[str, str | Callable[..., Decoder]] = {
    "AutoencoderKL": "image:ImageDecoder",
    "AutoencoderKLCogVideoX": "cogvideox:CogVideoXDecoder",
    "AutoencoderKLTemporalDecoder": "temporal:TemporalDecoder",
    "AutoencoderKLWan": "wan:WanDecoder",
}


def register(vae_class: type[nn.Module], decoder: Callable[..., Decoder]) -> None:
    """Make a decoder class known: `decoder(vae, latents, **decode_kwargs)` must return a `base.Decoder`."""
    _KNOWN[vae_class.__name__] = decoder


def decoder_of(vae: nn.Module, latents: Tensor, **decode_kwargs: Any) -> Decoder:
    """The adapter of a VAE, also of a subclass of a known one.

    Raises:
        UsageError: The class is not known, or the latents or arguments do not fit it.
    """
    return known_decoder(vae)(vae, latents, **decode_kwargs)


def known_decoder(vae: nn.Module) -> Callable[..., Decoder]:
    """What makes the adapter of a VAE; a UsageError if its class is not known."""
    for cls in type(vae).__mro__:
        if (known := _KNOWN.get(cls.__name__)) is not None:
            if not isinstance(known, str):
                return known
            module, name = known.split(":")
            return getattr(import_module(f".{module}", __name__), name)
    raise UsageError(
        f"decode: no decoder is known for {type(vae).__name__}; known are {', '.join(sorted(_KNOWN))}. "
        "To add one, subclass chopgrad_align.decoders.base.Decoder and pass it to chopgrad_align.decoders.register"
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


def refuse_tiling(vae: nn.Module, tiled: bool) -> None:
    if tiled:
        raise UsageError(
            f"decode: spatial tiling of {type(vae).__name__} is switched on and would be used at this size; "
            "gradients through tiles are not supported for it. Call vae.disable_tiling()"
        )

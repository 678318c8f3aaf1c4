"""Changes of the VAE that may make it faster, each a row of its own: none is on by default."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn

from ..decoding.backprop import Exact
from ..decoding.decode import FrameLoss
from ..decoding.decoders import known_decoder, register_decoder
from ..decoding.decoders.base import Block, Decoder, Tiled
from .rows import Method, Row

COMPILED = "torch.compile"


def option_rows(vae: nn.Module, options: Sequence[str]) -> dict[str, Method]:
    """A row for each option: the VAE, changed, by the fastest policy that is exact."""
    return dict(_row(OPTIONS[option](copy.deepcopy(vae)), option) for option in options)


def _row(changed: Any, option: str) -> tuple[str, Method]:
    # The compiler cannot trace the convolutions that are put in place.
    row = Row(Exact(checkpoint=False, memory_efficient_layers=option != COMPILED))

    def method(vae: nn.Module, latents: Tensor, loss: FrameLoss) -> Tensor:
        return row(changed, latents.to(changed.dtype), loss).to(latents.dtype)

    return f"{row.name}, {option}", method


def bfloat16(vae: nn.Module) -> nn.Module:
    return nn.Module.to(vae, torch.bfloat16)  # not diffusers' own, which warns of layers that these models lack


def channels_last(vae: nn.Module) -> nn.Module:
    for weight in vae.parameters():
        if weight.dim() == 5:  # `vae.to` would refuse the others
            weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def compiled(vae: nn.Module) -> nn.Module:
    """Compiles every block of the decoder, as the engine calls it; a class of its own stands for the changed VAE."""
    # Blocks share their code, and past the usual limit of 8 all further ones would silently run uncompiled.
    torch._dynamo.config.recompile_limit = 512
    torch._dynamo.config.accumulated_recompile_limit = 4096
    plain = known_decoder(vae)
    kept: dict[tuple[bool, int], Block] = {}

    def make(vae: nn.Module, latents: Tensor, **kwargs: Any) -> Decoder | Tiled:
        decoder: Any = plain(vae, latents, **kwargs)
        blocks = decoder.blocks

        def compiled_blocks(index: int) -> list[Block]:
            # The engine asks for new blocks each time. The first group may do other things than those after it.
            places = [(index == 0, number) for number in range(len(blocks(index)))]
            for place, block in zip(places, blocks(index), strict=True):
                if place not in kept:
                    kept[place] = torch.compile(block)
            return [kept[place] for place in places]

        decoder.blocks = compiled_blocks
        return decoder

    changed = type(f"Compiled{type(vae).__name__}", (type(vae),), {})
    register_decoder(changed, make)
    vae.__class__ = changed
    return vae


OPTIONS: dict[str, Callable[[Any], nn.Module]] = {
    "bfloat16": bfloat16,
    "channels_last_3d": channels_last,
    COMPILED: compiled,
}

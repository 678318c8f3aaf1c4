"""Kandinsky6SRVAE: groups of up to 16 frames (17 in the first), with a nested dict of caches that is written to.

Every block owns a branch of that dict, and works on a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import silu
from torch.utils._pytree import tree_map

from . import expect_latents
from .base import Block, Cache, Clamp, Decoder, Group, Hidden


class Kandinsky6SRDecoder(Decoder):
    def __init__(self, vae: Any, latents: Tensor) -> None:
        super().__init__(vae)
        expect_latents(vae, latents, "BCFHW")

    def groups(self, latents: Tensor) -> list[Group]:
        from diffusers.models.autoencoders.autoencoder_kandinsky6_sr import SEGMENT_FRAMES

        stride, count = self.vae.temporal_compression_ratio, latents.shape[2]
        size = SEGMENT_FRAMES // stride
        starts = [0, *range(1 + size, count, size)]
        # The first latent frame makes a single frame.
        return [
            Group(slice(start, stop), slice(max(0, stride * (start - 1) + 1), stride * (stop - 1) + 1))
            for start, stop in zip(starts, [*starts[1:], count], strict=True)
        ]

    def independent_frames(self, group: Group) -> list[Group]:
        return [group]

    def prologue(self, latents: Tensor) -> Tensor:
        return latents

    def blocks(self, index: int) -> Sequence[Block]:
        decoder, empty = self.vae.decoder, self.vae.decoder.make_cache()

        # Beside the hidden state every block reads the group's latents (spatial norm), which travel along.
        def owning(branch: Any, call: Callable[[Tensor, Tensor, Any], Tensor]) -> Block:
            def block(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
                x, latents = hidden
                cache = tree_map(lambda leaf: leaf, branch if cache is None else cache)
                return (call(x, latents, cache), latents), cache

            return block

        def resnet(layer: Any, x: Tensor, latents: Tensor, cache: Any) -> Tensor:
            return layer(x, cache, zq=latents)

        def unconditioned(layer: Any, x: Tensor, latents: Tensor, cache: Any) -> Tensor:
            return layer(x, cache)

        def leave(x: Tensor, latents: Tensor, cache: Any) -> Tensor:
            return decoder.conv_out(silu(decoder.norm_out(x, latents, cache["norm"])), cache["conv"])

        blocks = [
            lambda hidden, cache: ((hidden[0], hidden[0]), None),
            owning(empty["conv_in"], partial(unconditioned, decoder.conv_in)),
            owning(empty["mid_1"], partial(resnet, decoder.mid.block_1)),
            owning(empty["mid_2"], partial(resnet, decoder.mid.block_2)),
        ]
        for stage, branch in zip(reversed(decoder.up), reversed(empty["up"]), strict=True):
            blocks += [owning(b, partial(resnet, layer)) for layer, b in zip(stage.block, branch["block"], strict=True)]
            if hasattr(stage, "upsample"):
                blocks.append(owning(branch["upsample"], partial(unconditioned, stage.upsample)))
        return [*blocks, owning({"norm": empty["norm_out"], "conv": empty["conv_out"]}, leave)]

    def epilogue(self, output: Tensor, clamp: Clamp) -> Tensor:
        return output

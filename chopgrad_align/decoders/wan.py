"""AutoencoderKLWan: Wan 2.1, and Wan 2.2 with average-and-duplicate shortcuts and patchified pixels.

One latent frame a call. The model keeps the last two input frames of every causal convolution in a list that its
layers mutate; here each block owns its part of that list, and takes and returns it as a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn

from . import expect_latents, refuse_tiling
from .base import Block, Cache, Decoder, Group, Hidden, stateless


class WanDecoder(Decoder):
    def __init__(self, vae: Any, latents: Tensor) -> None:
        super().__init__(vae)
        expect_latents(vae, latents, "BCFHW")
        self.sliced = vae.use_slicing
        least = [
            size // vae.spatial_compression_ratio for size in (vae.tile_sample_min_height, vae.tile_sample_min_width)
        ]
        refuse_tiling(vae, vae.use_tiling and (latents.shape[-2] > least[0] or latents.shape[-1] > least[1]))
        self._stride = 2 ** sum(vae.temperal_upsample)

    def groups(self, latents: Tensor) -> list[Group]:
        stride = self._stride
        return [
            Group(slice(i, i + 1), slice(max(0, 1 + stride * (i - 1)), 1 + stride * i)) for i in range(latents.shape[2])
        ]

    def parts(self, group: Group) -> list[Group]:
        return [group]

    def prologue(self, latents: Tensor) -> Tensor:
        return self.vae.post_quant_conv(latents)

    def blocks(self, index: int) -> Sequence[Block]:
        decoder = self.vae.decoder
        blocks = [_conv(decoder.conv_in), _cached(decoder.mid_block.resnets[0])]
        for attention, resnet in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
            blocks += [stateless(attention), _cached(resnet)]
        for up_block in decoder.up_blocks:
            blocks += self._up_block(up_block, first=index == 0)
        return [*blocks, _conv(decoder.conv_out, lambda x: decoder.nonlinearity(decoder.norm_out(x)))]

    def _up_block(self, up_block: Any, first: bool) -> list[Block]:
        resnets = [_cached(resnet) for resnet in up_block.resnets]
        if not hasattr(up_block, "avg_shortcut"):  # Wan 2.1
            return resnets + [_cached(upsampler) for upsampler in up_block.upsamplers or ()]
        upsampler = [] if up_block.upsampler is None else [_cached(up_block.upsampler)]
        if up_block.avg_shortcut is None:
            return resnets + upsampler

        def join(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
            x, entry = hidden
            return (x + up_block.avg_shortcut(entry, first_chunk=first),), None

        return [_branch, *resnets, *upsampler, join]

    def epilogue(self, output: Tensor, clamp: Callable[[Tensor], Tensor]) -> Tensor:
        patch = self.vae.config.patch_size
        return clamp(output if patch is None else unpatchify(output, patch_size=patch))


def _cached(layer: nn.Module) -> Block:
    """A residual or resampling layer, with as many cache entries as it makes."""

    def block(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
        # Layers index the list by a running counter and replace entries in it; two is the most that any layer has.
        entries: list[Tensor | str | None] = [None, None] if cache is None else list(cache)
        return (layer(hidden[0], feat_cache=entries, feat_idx=[0]), *hidden[1:]), tuple(entries)

    return block


def _conv(convolution: nn.Module, before: Callable[[Tensor], Tensor] = lambda x: x) -> Block:
    """The first or the last convolution; its cache is the last two frames of its input."""

    def block(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
        x = before(hidden[0])
        recent = x[:, :, -2:].clone()
        if recent.shape[2] < 2 and cache is not None:
            recent = torch.cat([cache[:, :, -1:], recent], 2)
        return (convolution(x, cache), *hidden[1:]), recent

    return block


def _branch(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
    return (hidden[0], hidden[0]), None

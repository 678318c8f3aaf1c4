"""AutoencoderKLWan: Wan 2.1, and Wan 2.2 with average-and-duplicate shortcuts and patchified pixels; Qwen-Image's.

One latent frame a call. The model keeps the last two input frames of every causal convolution in a list that its
layers mutate; here each block owns its part of that list, and takes and returns it as a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn

from ..memory_efficient_layers import framewise
from . import expect_latents
from .base import Block, Cache, Clamp, Decoder, Group, Hidden, SpatiallyLocalBlock, Tiled, stateless
from .tiles import SpatialTiles, larger, strided_cuts

Finish = Callable[[Tensor, Clamp], Tensor]


def wan(vae: Any, latents: Tensor) -> Decoder | Tiled:
    expect_latents(vae, latents, "BCFHW")
    patch = vae.config.patch_size or 1

    def finish(pixels: Tensor, clamp: Clamp) -> Tensor:
        return clamp(unpatchify(pixels, patch_size=patch))

    if vae.use_tiling and larger(latents, strided_cuts(vae)):
        scale = vae.spatial_compression_ratio // patch
        return SpatialTiles(WanDecoder(vae, None), strided_cuts(vae, patch), scale, finish)
    return WanDecoder(vae, finish)


def qwen_image(vae: Any, latents: Tensor) -> Decoder | Tiled:
    expect_latents(vae, latents, "BCFHW")
    if vae.use_tiling and larger(latents, strided_cuts(vae)):
        # The model does not clamp the pixels of tiles.
        return SpatialTiles(WanDecoder(vae, None), strided_cuts(vae), vae.spatial_compression_ratio)
    return WanDecoder(vae, lambda pixels, clamp: clamp(pixels))


class WanDecoder(Decoder):
    """`finish` makes pixels of the last convolution's output; it is `None` for a tile, which is finished later."""

    insensitive_to_rounding = True  # each position is normalised over its channels

    def __init__(self, vae: Any, finish: Finish | None) -> None:
        super().__init__(vae)
        self.sliced = vae.use_slicing
        self._finish = finish
        self._stride = 2 ** sum(vae.temperal_upsample)

    def groups(self, latents: Tensor) -> list[Group]:
        stride = self._stride
        return [
            Group(slice(i, i + 1), slice(max(0, 1 + stride * (i - 1)), 1 + stride * i)) for i in range(latents.shape[2])
        ]

    def independent_frames(self, group: Group) -> list[Group]:
        return [group]

    def prologue(self, latents: Tensor) -> Tensor:
        return latents if self._finish is None else self.vae.post_quant_conv(latents)

    def blocks(self, index: int) -> Sequence[Block]:
        decoder = self.vae.decoder
        # Of a tile the model passes frame after frame through it; the bits of a convolution depend on its extent.
        blocks = [stateless(self.vae.post_quant_conv)] if self._finish is None else []
        blocks += [_convolution(decoder.conv_in), _resnet(decoder.mid_block.resnets[0])]
        for attention, resnet in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
            blocks += [stateless(attention), _resnet(resnet)]
        for up_block in decoder.up_blocks:
            blocks += self._up_block(up_block, first=index == 0)
        return [*blocks, _convolution(decoder.conv_out, decoder.norm_out, decoder.nonlinearity)]

    def _up_block(self, up_block: Any, first: bool) -> list[Block]:
        resnets = [_resnet(resnet) for resnet in up_block.resnets]
        if not hasattr(up_block, "avg_shortcut"):  # Wan 2.1
            return resnets + [_upsampler(upsampler) for upsampler in up_block.upsamplers or ()]
        upsampler = [] if up_block.upsampler is None else [_upsampler(up_block.upsampler)]
        if up_block.avg_shortcut is None:
            return resnets + upsampler

        def join(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
            x, entry = hidden
            return (x + up_block.avg_shortcut(entry, first_chunk=first),), None

        return [_branch, *resnets, *upsampler, join]

    def epilogue(self, output: Tensor, clamp: Clamp) -> Tensor:
        return output if self._finish is None else self._finish(output, clamp)


def _convolution(convolution: nn.Module, *before: nn.Module) -> Block:
    """The first or the last convolution, after layers that are applied to each frame."""
    return SpatiallyLocalBlock(lambda x, cache: _causal(convolution, framewise(before, x), cache), halo=1)


def _resnet(resnet: Any) -> Block:
    def run(x: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        first, second = cache or (None, None)
        shortcut = resnet.conv_shortcut(x)
        x, first = _causal(resnet.conv1, framewise((resnet.norm1, resnet.nonlinearity), x), first)
        x = resnet.dropout(framewise((resnet.norm2, resnet.nonlinearity), x))
        x, second = _causal(resnet.conv2, x, second)
        return x + shortcut, (first, second)

    block = SpatiallyLocalBlock(run, halo=2)
    # With dropout it is no longer local: a few rows draw other random numbers than all of them.
    return block.__call__ if resnet.training and resnet.dropout.p else block


def _upsampler(upsampler: nn.Module) -> Block:
    def run(x: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        # The layer indexes the list by a running counter and replaces entries in it.
        entries: list[Tensor | str | None] = [cache]
        return upsampler(x, feat_cache=entries, feat_idx=[0]), entries[0]

    return SpatiallyLocalBlock(run, halo=1, scale=2)


def _causal(convolution: nn.Module, x: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
    """A causal convolution; its cache is the last two frames of its input."""
    recent = x[:, :, -2:].clone()
    if recent.shape[2] < 2 and cache is not None:
        recent = torch.cat([cache[:, :, -1:], recent], 2)
    return convolution(x, cache), recent


def _branch(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
    return (hidden[0], hidden[0]), None

"""AutoencoderKLMagvit (EasyAnimate): the first latent frame alone, then groups; caches live on the modules.

Here a block puts its caches on the modules, runs, takes them off again as values, and leaves the modules as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_magvit import EasyAnimateCausalConv3d, EasyAnimateUpsampler3D
from torch import Tensor, nn

from . import expect_latents
from .base import Block, Cache, Clamp, Decoder, Group, Hidden, Tiled
from .tiles import SpatialTiles, strided_cuts


def magvit(vae: Any, latents: Tensor) -> Decoder | Tiled:
    expect_latents(vae, latents, "BCFHW")
    decoder, (height, width) = MagvitDecoder(vae), strided_cuts(vae)
    # The model compares the width with the height of a tile, and the height with its width.
    if vae.use_tiling and (latents.shape[-1] > height.size or latents.shape[-2] > width.size):
        return SpatialTiles(decoder, (height, width), vae.spatial_compression_ratio)
    return decoder


class MagvitDecoder(Decoder):
    """Slicing decodes each sample from clean caches; the model's own hands those of one sample to the next."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.sliced = vae.use_slicing
        upsamplers = (up_block.upsampler for up_block in vae.decoder.up_blocks)
        self._stride = 2 ** sum(upsampler is not None and upsampler.temporal_upsample for upsampler in upsamplers)

    def groups(self, latents: Tensor) -> list[Group]:
        count, stride = latents.shape[2], self._stride
        starts = [0, *range(1, count, self.vae.num_latent_frames_batch_size)]
        return [
            Group(slice(i, j), slice(max(0, 1 + stride * (i - 1)), 1 + stride * (j - 1)))
            for i, j in zip(starts, [*starts[1:], count], strict=True)
        ]

    def independent_frames(self, group: Group) -> list[Group]:
        return [group]

    def prologue(self, latents: Tensor) -> Tensor:
        return self.vae.post_quant_conv(latents)

    def blocks(self, index: int) -> Sequence[Block]:
        decoder = self.vae.decoder
        layers = [decoder.conv_in, *decoder.mid_block.convs]
        for up_block in decoder.up_blocks:
            layers += [*up_block.convs, *([] if up_block.upsampler is None else [up_block.upsampler])]

        def leave(x: Tensor) -> Tensor:
            if decoder.spatial_group_norm:  # frame by frame
                frames = decoder.conv_norm_out(x.transpose(1, 2).flatten(0, 1))
                x = frames.unflatten(0, (len(x), -1)).transpose(1, 2)
            else:
                x = decoder.conv_norm_out(x)
            return decoder.conv_out(decoder.conv_act(x))

        return [*(_cached(layer, layer) for layer in layers), _cached(decoder.conv_out, leave)]

    def epilogue(self, output: Tensor, clamp: Clamp) -> Tensor:
        return output


def _cached(owner: nn.Module, call: Callable[[Tensor], Tensor]) -> Block:
    """`call`, with the caches of the modules within `owner` going in and coming out as values."""
    keepers: list[Any] = [m for m in owner.modules() if isinstance(m, EasyAnimateCausalConv3d | EasyAnimateUpsampler3D)]

    def block(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
        before = [keeper.prev_features for keeper in keepers]
        try:
            for keeper, features in zip(keepers, cache or [None] * len(keepers), strict=True):
                keeper.prev_features = features
            x = call(hidden[0])
            after = [_value(keeper) for keeper in keepers]
        finally:
            for keeper, features in zip(keepers, before, strict=True):
                keeper.prev_features = features
        return (x,), after

    return block


def _value(keeper: Any) -> Tensor | str | None:
    # An upsampler keeps a whole frame, but only ever asks whether it has one.
    if isinstance(keeper, EasyAnimateUpsampler3D) and keeper.prev_features is not None:
        return "started"
    return keeper.prev_features

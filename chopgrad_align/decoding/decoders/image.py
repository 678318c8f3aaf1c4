"""AutoencoderKL: a decoder of single frames, which have nothing to do with each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import expect_latents
from .base import Block, Clamp, Decoder, Group, Tiled, stateless
from .tiles import Blend, SpatialTiles, larger, overlapping_cut


def image(vae: Any, latents: Tensor, generator: Any = None) -> Decoder | Tiled:
    """Latents `(N, C, H, W)`, as `vae.decode` takes them, or a video `(B, C, F, H, W)`, decoded frame by frame."""
    expect_latents(vae, latents, "NCHW", "BCFHW")
    decoder = ImageDecoder(vae, time_axis=0 if latents.dim() == 4 else 2)
    cut = overlapping_cut(vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor)
    if not (vae.use_tiling and larger(latents, (cut, cut))):
        return decoder
    blends: list[Blend] = [vae.blend_v, vae.blend_h]
    return SpatialTiles(decoder, (cut, cut), blend=blends if latents.dim() == 4 else list(map(_of_frames, blends)))


def _of_frames(blend: Blend) -> Blend:
    def blend_frames(before: Tensor, tile: Tensor, extent: int) -> Tensor:
        images = blend(before.transpose(1, 2).flatten(0, 1), tile.transpose(1, 2).flatten(0, 1), extent)
        return images.unflatten(0, (len(tile), -1)).transpose(1, 2)

    return blend_frames


class ImageDecoder(Decoder):
    recurrent = False

    def __init__(self, vae: Any, time_axis: int) -> None:
        super().__init__(vae)
        self.time_axis = time_axis

    def groups(self, latents: Tensor) -> list[Group]:
        count = latents.shape[self.time_axis]
        if self.time_axis == 0 and not self.vae.use_slicing:
            return [Group(slice(0, count), slice(0, count))]  # one call, so that the pixels have the same bits
        return [Group(slice(i, i + 1), slice(i, i + 1)) for i in range(count)]

    def independent_frames(self, group: Group) -> list[Group]:
        return [Group(slice(i, i + 1), slice(i, i + 1)) for i in range(group.latents.start, group.latents.stop)]

    def prologue(self, latents: Tensor) -> Tensor:
        return latents

    def blocks(self, index: int) -> Sequence[Block]:
        vae, decoder = self.vae, self.vae.decoder
        blocks = [stateless(self._enter), stateless(decoder.conv_in), stateless(decoder.mid_block)]
        blocks += [stateless(up_block) for up_block in decoder.up_blocks]
        blocks += [stateless(lambda x: decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x))))]
        if vae.post_quant_conv is not None:
            blocks.insert(1, stateless(vae.post_quant_conv))
        return blocks

    def _enter(self, latents: Tensor) -> Tensor:
        return latents if self.time_axis == 0 else latents.squeeze(2)

    def epilogue(self, output: Tensor, clamp: Clamp) -> Tensor:
        return output if self.time_axis == 0 else output.unsqueeze(2)

"""AutoencoderKLHunyuanVideo and AutoencoderKLHunyuanVideo15: causal convolutions without a cache, decoded whole.

HunyuanVideo's group norms are over time as well, so that there is no recurrence in it. Long clips it decodes in tiles
over time, by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import prepare_causal_attention_mask
from torch import Tensor

from . import expect_latents
from .base import Block, Decoder, Tiled, WholeDecoder, stateless
from .tiles import SpatialTiles, TemporalTiles, in_overlapping_tiles, larger, strided_cuts, strided_time_cut


def hunyuan_video(vae: Any, latents: Tensor) -> Decoder | Tiled:
    expect_latents(vae, latents, "BCFHW")
    cuts, time_cut = strided_cuts(vae), strided_time_cut(vae)
    decoder: Decoder | SpatialTiles = HunyuanVideoDecoder(vae)
    if vae.use_tiling and larger(latents, cuts):
        decoder = SpatialTiles(HunyuanVideoDecoder(vae), cuts, vae.spatial_compression_ratio)
    if vae.use_framewise_decoding and latents.shape[2] > time_cut.size:
        return TemporalTiles(decoder, time_cut, vae.temporal_compression_ratio, dropped=0)
    return decoder


def hunyuan_video15(vae: Any, latents: Tensor) -> Decoder | Tiled:
    expect_latents(vae, latents, "BCFHW")
    return in_overlapping_tiles(HunyuanVideo15Decoder(vae), latents, (vae.tile_overlap_factor, vae.tile_overlap_factor))


class HunyuanVideoDecoder(WholeDecoder):
    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.sliced = vae.use_slicing

    def count_frames(self, latent_frames: int) -> int:
        for upsampler in _upsamplers(self.vae):
            latent_frames = 1 + (latent_frames - 1) * upsampler.upsample_factor[0]
        return latent_frames

    def blocks(self, index: int) -> Sequence[Block]:
        vae, decoder = self.vae, self.vae.decoder

        def attend(layer: Any) -> Block:
            def call(x: Tensor) -> Tensor:
                frames, height, width = x.shape[2:]
                tokens = x.permute(0, 2, 3, 4, 1).flatten(1, 3)
                mask = prepare_causal_attention_mask(frames, height * width, x.dtype, x.device, batch_size=len(x))
                tokens = layer(tokens, attention_mask=mask)
                return tokens.unflatten(1, (frames, height, width)).permute(0, 4, 1, 2, 3)

            return stateless(call)

        def leave(x: Tensor) -> Tensor:
            return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x)))

        enter = [stateless(vae.post_quant_conv), stateless(decoder.conv_in)]
        attentions = [None if layer is None else attend(layer) for layer in decoder.mid_block.attentions]
        return [*enter, *_middle(decoder.mid_block, attentions), *_upwards(decoder), stateless(leave)]


class HunyuanVideo15Decoder(WholeDecoder):
    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.sliced = vae.use_slicing

    def count_frames(self, latent_frames: int) -> int:
        for upsampler in _upsamplers(self.vae):
            latent_frames = 2 * latent_frames - 1 if upsampler.add_temporal_upsample else latent_frames
        return latent_frames

    def blocks(self, index: int) -> Sequence[Block]:
        decoder = self.vae.decoder

        def enter(x: Tensor) -> Tensor:
            return decoder.conv_in(x) + x.repeat_interleave(repeats=decoder.repeat, dim=1)

        def leave(x: Tensor) -> Tensor:
            return decoder.conv_out(decoder.conv_act(decoder.norm_out(x)))

        attentions = [None if layer is None else stateless(layer) for layer in decoder.mid_block.attentions]
        return [stateless(enter), *_middle(decoder.mid_block, attentions), *_upwards(decoder), stateless(leave)]


def _upsamplers(vae: Any) -> list[Any]:
    return [upsampler for up_block in vae.decoder.up_blocks for upsampler in up_block.upsamplers or ()]


def _middle(mid_block: Any, attentions: list[Block | None]) -> list[Block]:
    blocks = [stateless(mid_block.resnets[0])]
    for attention, resnet in zip(attentions, mid_block.resnets[1:], strict=True):
        blocks += [stateless(resnet)] if attention is None else [attention, stateless(resnet)]
    return blocks


def _upwards(decoder: Any) -> list[Block]:
    return [
        stateless(layer)
        for up_block in decoder.up_blocks
        for layer in (*up_block.resnets, *(up_block.upsamplers or ()))
    ]

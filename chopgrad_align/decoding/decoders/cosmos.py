"""AutoencoderKLCosmos: causal convolutions and attention without a cache, decoded whole; its tiling has no effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import silu

from . import expect_latents
from .base import Block, WholeDecoder, stateless


class CosmosDecoder(WholeDecoder):
    def __init__(self, vae: Any, latents: Tensor) -> None:
        super().__init__(vae)
        expect_latents(vae, latents, "BCFHW")
        self.sliced = vae.use_slicing

    def count_frames(self, latent_frames: int) -> int:
        for up_block in self.vae.decoder.up_blocks:
            if any(upsampler.temporal_upsample for upsampler in up_block.upsamplers or ()):
                latent_frames = 2 * latent_frames - 1
        patch = self.vae.decoder.unpatch_embed.patch_size
        return patch * latent_frames - (patch - 1)

    def blocks(self, index: int) -> Sequence[Block]:
        decoder, middle = self.vae.decoder, self.vae.decoder.mid_block
        layers = [self.vae.post_quant_conv, decoder.conv_in, middle.resnets[0]]
        for resnet, attention, in_time in zip(
            middle.resnets[1:], middle.attentions, middle.temp_attentions, strict=True
        ):
            layers += [attention, _causal(in_time), resnet]
        for up_block in decoder.up_blocks:
            for resnet, attention, in_time in zip(
                up_block.resnets, up_block.attentions, up_block.temp_attentions, strict=True
            ):
                layers += [resnet] if attention is None else [resnet, attention, _causal(in_time)]
            layers += up_block.upsamplers or ()
        layers += [lambda x: decoder.conv_out(silu(decoder.norm_out(x))), decoder.unpatch_embed]
        return [stateless(layer) for layer in layers]


def _causal(attention: Any) -> Callable[[Tensor], Tensor]:
    def attend(x: Tensor) -> Tensor:
        frames = x.shape[2]
        return attention(x, x.new_ones(frames, frames).tril().bool())

    return attend

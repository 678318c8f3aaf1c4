"""AutoencoderKLCogVideoX: groups of two latent frames, the remainder in the *first*; caches returned in a dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import expect_latents
from .base import Block, Cache, Clamp, Decoder, Group, Hidden, Tiled, stateless
from .tiles import in_overlapping_tiles


def cogvideox(vae: Any, latents: Tensor) -> Decoder | Tiled:
    expect_latents(vae, latents, "BCFHW")
    overlap = vae.tile_overlap_factor_height, vae.tile_overlap_factor_width
    return in_overlapping_tiles(CogVideoXDecoder(vae), latents, overlap)


class CogVideoXDecoder(Decoder):
    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.sliced = vae.use_slicing

    def groups(self, latents: Tensor) -> list[Group]:
        size, count = self.vae.num_latent_frames_batch_size, latents.shape[2]
        starts = [0, *range(size + count % size, count, size)]
        groups: list[Group] = []
        for start, stop in zip(starts, [*starts[1:], count], strict=True):
            shown = groups[-1].frames.stop if groups else 0
            groups.append(Group(slice(start, stop), slice(shown, shown + self._frames(stop - start))))
        return groups

    def _frames(self, latent_frames: int) -> int:
        # Every temporal upsampling doubles the frames, but keeps the first of an odd number single.
        for up_block in self.vae.decoder.up_blocks:
            if any(upsampler.compress_time for upsampler in up_block.upsamplers or ()):
                latent_frames = 2 * latent_frames - latent_frames % 2
        return latent_frames

    def independent_frames(self, group: Group) -> list[Group]:
        return [group]

    def prologue(self, latents: Tensor) -> Tensor:
        return latents

    def blocks(self, index: int) -> Sequence[Block]:
        vae, decoder = self.vae, self.vae.decoder

        # Beside the hidden state every block reads the group's latents (spatial norm), which travel along.
        def enter(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
            latents = hidden[0] if vae.post_quant_conv is None else vae.post_quant_conv(hidden[0])
            x, cache = decoder.conv_in(latents, conv_cache=cache)
            return (x, latents), cache

        def wrap(resnet: Any) -> Block:
            def block(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
                x, latents = hidden
                x, cache = resnet(x, None, latents, conv_cache=cache)
                return (x, latents), cache

            return block

        def leave(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
            norm_cache, conv_cache = (None, None) if cache is None else cache
            x, norm_cache = decoder.norm_out(*hidden, conv_cache=norm_cache)
            x, conv_cache = decoder.conv_out(decoder.conv_act(x), conv_cache=conv_cache)
            return (x,), (norm_cache, conv_cache)

        blocks = [enter, *map(wrap, decoder.mid_block.resnets)]
        for up_block in decoder.up_blocks:
            blocks += [*map(wrap, up_block.resnets), *map(stateless, up_block.upsamplers or ())]
        return [*blocks, leave]

    def epilogue(self, output: Tensor, clamp: Clamp) -> Tensor:
        return output

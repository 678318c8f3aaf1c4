"""AutoencoderKLMochi: a recurrence with `use_framewise_decoding`, which diffusers has off by default; else whole.

Its convolutions keep caches when their `pad_mode` is "constant", and then need a padding in space, which they are only
built with in that mode: `vae._enable_framewise_decoding()` changes the mode of built ones, and the model then fails.
With "replicate" each group of latents is decoded on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import expect_latents
from .base import Block, Cache, Clamp, Decoder, Group, Hidden, Tiled, stateless
from .tiles import SpatialTiles, larger, strided_cuts


def mochi(vae: Any, latents: Tensor) -> Decoder | Tiled:
    expect_latents(vae, latents, "BCFHW")
    decoder, cuts = MochiDecoder(vae), strided_cuts(vae)
    if vae.use_tiling and larger(latents, cuts):
        return SpatialTiles(decoder, cuts, vae.spatial_compression_ratio)
    return decoder


class MochiDecoder(Decoder):
    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.sliced = vae.use_slicing
        self.recurrent = vae.use_framewise_decoding
        self._ratio: int = vae.temporal_compression_ratio
        # The first latent frame makes one frame that is shown; the model makes the others and drops them.
        self._dropped = self._ratio - 1 if vae.drop_last_temporal_frames else 0

    def groups(self, latents: Tensor) -> list[Group]:
        count = latents.shape[2]
        size = self.vae.num_latent_frames_batch_size if self.recurrent else count
        ends = [*range(size, count, size), count]
        return [
            Group(slice(i, j), slice(max(0, i * self._ratio - self._dropped), j * self._ratio - self._dropped))
            for i, j in zip([0, *ends], ends, strict=False)
        ]

    def independent_frames(self, group: Group) -> list[Group]:
        return [group]

    def prologue(self, latents: Tensor) -> Tensor:
        return latents

    def blocks(self, index: int) -> Sequence[Block]:
        decoder = self.vae.decoder
        blocks = [stateless(decoder.conv_in), *self._resnets(decoder.block_in)]
        for up_block in decoder.up_blocks:
            blocks += [*self._resnets(up_block), stateless(_expand(up_block))]
        blocks += self._resnets(decoder.block_out)

        def leave(x: Tensor) -> Tensor:
            x = decoder.proj_out(decoder.nonlinearity(x).movedim(1, -1)).movedim(-1, 1)
            return x[:, :, self._dropped :] if index == 0 else x

        return [*blocks, stateless(leave)]

    def _resnets(self, stage: Any) -> list[Block]:
        def wrap(resnet: Any) -> Block:
            def block(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
                x, cache = resnet(hidden[0], conv_cache=cache)
                return (x,), cache if self.recurrent else None

            return block

        return [wrap(resnet) for resnet in stage.resnets]

    def epilogue(self, output: Tensor, clamp: Clamp) -> Tensor:
        return output


def _expand(up_block: Any) -> Callable[[Tensor], Tensor]:
    """A linear layer whose channels are folded out into time and space."""
    factors = (up_block.temporal_expansion, up_block.spatial_expansion, up_block.spatial_expansion)

    def expand(x: Tensor) -> Tensor:
        x = up_block.proj(x.movedim(1, -1)).movedim(-1, 1).unflatten(1, (-1, *factors))  # B C t h w F H W
        return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    return expand

"""AutoencoderKL: a decoder of single frames, which have nothing to do with each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import expect_latents, refuse_tiling
from .base import Block, Decoder, Group, stateless


class ImageDecoder(Decoder):
    """Latents `(N, C, H, W)`, as `vae.decode` takes them, or a video `(B, C, F, H, W)`, decoded frame by frame."""

    recurrent = False

    def __init__(self, vae: Any, latents: Tensor, generator: Any = None) -> None:
        super().__init__(vae)
        expect_latents(vae, latents, "NCHW", "BCFHW")
        refuse_tiling(vae, vae.use_tiling and max(latents.shape[-2:]) > vae.tile_latent_min_size)
        self.time_axis = 0 if latents.dim() == 4 else 2

    def groups(self, latents: Tensor) -> list[Group]:
        count = latents.shape[self.time_axis]
        if self.time_axis == 0 and not self.vae.use_slicing:
            return [Group(slice(0, count), slice(0, count))]  # one call, so that the pixels have the same bits
        return [Group(slice(i, i + 1), slice(i, i + 1)) for i in range(count)]

    def parts(self, group: Group) -> list[Group]:
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

    def epilogue(self, output: Tensor, clamp: Callable[[Tensor], Tensor]) -> Tensor:
        return output if self.time_axis == 0 else output.unsqueeze(2)

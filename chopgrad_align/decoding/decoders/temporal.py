"""AutoencoderKLTemporalDecoder (Stable Video Diffusion): one chunk of frames a call, decoded whole.

Its temporal convolutions look both ways, so that a chunk is no recurrence: the clips of a batch are independent, and
within a clip memory is saved by recomputing blocks. How many frames a chunk has is the pipeline's `decode_chunk_size`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...common.errors import UsageError
from . import expect_latents
from .base import Block, Clamp, Decoder, Group, stateless


class TemporalDecoder(Decoder):
    recurrent = False
    time_axis = 0

    def __init__(self, vae: Any, latents: Tensor, num_frames: int) -> None:
        super().__init__(vae)
        expect_latents(vae, latents, "NCHW")
        if num_frames < 1 or latents.shape[0] % num_frames:
            raise UsageError(f"decode: {latents.shape[0]} latent frames are not whole clips of num_frames={num_frames}")
        self._clip = num_frames

    def groups(self, latents: Tensor) -> list[Group]:
        return [Group(slice(0, latents.shape[0]), slice(0, latents.shape[0]))]

    def independent_frames(self, group: Group) -> list[Group]:
        starts = range(group.latents.start, group.latents.stop, self._clip)
        return [Group(slice(i, i + self._clip), slice(i, i + self._clip)) for i in starts]

    def prologue(self, latents: Tensor) -> Tensor:
        return latents

    def blocks(self, index: int) -> Sequence[Block]:
        decoder = self.vae.decoder

        def with_indicator(layer: Any) -> Callable[[Tensor], Tensor]:
            def call(x: Tensor) -> Tensor:
                indicator = torch.zeros(x.shape[0] // self._clip, self._clip, dtype=x.dtype, device=x.device)
                return layer(x, image_only_indicator=indicator)

            return call

        def head(x: Tensor) -> Tensor:
            x = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x)))
            clips = x.unflatten(0, (-1, self._clip)).transpose(1, 2)
            return decoder.time_conv_out(clips).transpose(1, 2).flatten(0, 1)

        middle, dtype = decoder.mid_block, next(decoder.up_blocks.parameters()).dtype
        layers = [decoder.conv_in, with_indicator(middle.resnets[0])]
        # There is one attention; `zip` drops the resnets after the second, as the model's own does.
        for resnet, attention in zip(middle.resnets[1:], middle.attentions, strict=False):
            layers += [attention, with_indicator(resnet)]
        layers.append(lambda x: x.to(dtype))
        for up_block in decoder.up_blocks:
            layers += [*map(with_indicator, up_block.resnets), *(up_block.upsamplers or ())]
        return [stateless(layer) for layer in (*layers, head)]

    def epilogue(self, output: Tensor, clamp: Clamp) -> Tensor:
        return output

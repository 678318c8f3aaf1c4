"""AutoencoderKLLTXVideo and AutoencoderKLLTX2Video: decoded whole, with noise and a timestep where configured.

The noise comes from the global generator, whose state the engine restores when a block runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ...common.errors import UsageError
from . import expect_latents
from .base import Block, Decoder, Tiled, WholeDecoder, stateless
from .tiles import SpatialTiles, TemporalTiles, larger, strided_cuts, strided_time_cut


def ltx_video(vae: Any, latents: Tensor, temb: Tensor | None = None) -> Decoder | Tiled:
    norm = vae.decoder.norm_out  # over the last axis
    return _in_tiles(vae, latents, LTXDecoder(vae, latents, temb, lambda x: norm(x.movedim(1, -1)).movedim(-1, 1)))


def ltx2_video(vae: Any, latents: Tensor, temb: Tensor | None = None, causal: bool | None = None) -> Decoder | Tiled:
    convolution = {"causal": causal or vae.decoder.is_causal}
    return _in_tiles(vae, latents, LTXDecoder(vae, latents, temb, vae.decoder.norm_out, **convolution))


def _in_tiles(vae: Any, latents: Tensor, whole: LTXDecoder) -> Decoder | Tiled:
    cuts, time_cut = strided_cuts(vae), strided_time_cut(vae)
    decoder: Decoder | SpatialTiles = whole
    if vae.use_tiling and larger(latents, cuts):
        decoder = SpatialTiles(whole, cuts, vae.spatial_compression_ratio)
    if vae.use_framewise_decoding and latents.shape[2] > time_cut.size:
        return TemporalTiles(decoder, time_cut, vae.temporal_compression_ratio, dropped=-1)
    return decoder


class LTXDecoder(WholeDecoder):
    """`convolution` is what every layer with convolutions takes besides: in LTX-2 whether they are causal."""

    def __init__(
        self,
        vae: Any,
        latents: Tensor,
        temb: Tensor | None,
        norm_out: Callable[[Tensor], Tensor],
        **convolution: bool,
    ) -> None:
        super().__init__(vae)
        expect_latents(vae, latents, "BCFHW")
        self.sliced = vae.use_slicing
        if self.sliced and temb is not None and latents.shape[0] > 1:
            raise UsageError(
                f"decode: {type(vae).__name__} cannot slice a batch that has timesteps (`temb`), by an error of its "
                "own; call vae.disable_slicing()"
            )
        if temb is None and vae.decoder.time_embedder is not None:
            raise UsageError(f"decode: this {type(vae).__name__} is conditioned on a timestep; pass temb=")
        if temb is not None and temb.requires_grad:
            raise UsageError("decode: `temb` requires a gradient, which it would not get; pass temb.detach()")
        self._temb, self._norm_out, self._convolution = temb, norm_out, convolution

    def count_frames(self, latent_frames: int) -> int:
        for up_block in self.vae.decoder.up_blocks:
            for upsampler in up_block.upsamplers or ():
                latent_frames = 1 + (latent_frames - 1) * upsampler.stride[0]
        return latent_frames * self.vae.decoder.patch_size_t

    def blocks(self, index: int) -> Sequence[Block]:
        decoder = self.vae.decoder
        layers = [self._convolved(decoder.conv_in), *self._resnets(decoder.mid_block)]
        for up_block in decoder.up_blocks:
            if up_block.conv_in is not None:  # which takes the timestep as it is, without an embedding
                layers.append(self._resnet(up_block.conv_in, lambda x: self._timestep()))
            layers += [self._convolved(upsampler) for upsampler in up_block.upsamplers or ()]
            layers += self._resnets(up_block)
        return [stateless(layer) for layer in (*layers, self._leave)]

    def _convolved(self, layer: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: layer(x, **self._convolution)

    def _resnets(self, stage: Any) -> list[Callable[[Tensor], Tensor]]:
        return [self._resnet(resnet, lambda x: self._embedding(stage.time_embedder, x)) for resnet in stage.resnets]

    def _resnet(self, resnet: Any, condition: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor]:
        return lambda x: resnet(x, condition(x), **self._convolution)

    def _timestep(self) -> Tensor | None:
        scale = self.vae.decoder.timestep_scale_multiplier
        return self._temb if scale is None or self._temb is None else self._temb * scale

    def _embedding(self, embedder: Any, x: Tensor) -> Tensor | None:
        """The timestep embedding of a stage, made anew by each block of it, so that the blocks stay independent."""
        timestep = self._timestep()
        if embedder is None or timestep is None:
            return timestep
        embedding = embedder(
            timestep=timestep.flatten(), resolution=None, aspect_ratio=None, batch_size=len(x), hidden_dtype=x.dtype
        )
        return embedding.view(len(x), -1, 1, 1, 1)

    def _leave(self, x: Tensor) -> Tensor:
        decoder = self.vae.decoder
        x = self._norm_out(x)
        if decoder.time_embedder is not None:
            embedding = self._embedding(decoder.time_embedder, x)
            assert embedding is not None  # or the constructor would have refused
            table = embedding.unflatten(1, (2, -1)) + decoder.scale_shift_table[None, ..., None, None, None]
            shift, scale = table.unbind(1)
            x = x * (1 + scale) + shift
        x = decoder.conv_out(decoder.conv_act(x), **self._convolution)
        # Channels to pixels: B (C t w h) F H W, with width before height as the model has it.
        x = x.unflatten(1, (-1, decoder.patch_size_t, decoder.patch_size, decoder.patch_size))
        return x.permute(0, 1, 5, 2, 6, 4, 7, 3).flatten(6, 7).flatten(4, 5).flatten(2, 3)

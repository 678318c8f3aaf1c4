"""AutoencoderKLAllegro: always in tiles over time, height and width, which are weighted and added up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_allegro import _prepare_for_blend
from torch import Tensor

from ...common.errors import UsageError
from . import expect_latents
from .base import Block, Clamp, Tiled, WholeDecoder, stateless


class AllegroTiles(Tiled):
    framewise = False

    def __init__(self, vae: Any, latents: Tensor) -> None:
        super().__init__(AllegroDecoder(vae))
        self.time_axis = 1  # of the pixels, which are (B, F, C, H, W)
        expect_latents(vae, latents, "BCFHW")
        if not vae.use_tiling:
            raise UsageError("decode: AutoencoderKLAllegro decodes in tiles only; call vae.enable_tiling()")
        if latents.shape[0] > 1 and not vae.use_slicing:
            raise UsageError("decode: AutoencoderKLAllegro decodes one sample at a time; call vae.enable_slicing()")
        self._pixels_per_latent = (vae.config.temporal_compression_ratio, *(vae.spatial_compression_ratio,) * 2)
        self._size = [side // ratio for side, ratio in zip(vae.kernel, self._pixels_per_latent, strict=True)]
        self._stride = [side // ratio for side, ratio in zip(vae.stride, self._pixels_per_latent, strict=True)]
        sides = zip(latents.shape[2:], self._size, self._stride, strict=True)
        self._counts = [(extent - size) // stride + 1 for extent, size, stride in sides]
        if min(self._counts) < 1:
            raise UsageError(
                f"decode: latents of {tuple(latents.shape[2:])} (frames, height, width) are smaller than a tile of "
                f"AutoencoderKLAllegro, {tuple(self._size)}, and would decode to black"
            )

    def tiles(self, latents: Tensor) -> list[Tensor]:
        images = self.vae.post_quant_conv(latents.transpose(1, 2).flatten(0, 1))
        latents = images.unflatten(0, (len(latents), -1)).transpose(1, 2)
        return [latents[:, :, t, y, x].contiguous() for t, y, x in self._windows(self._size, self._stride)]

    def join(self, tiles: list[Tensor], latents: Tensor, clamp: Clamp) -> Tensor:
        kernel, stride = self.vae.kernel, self.vae.stride
        overlaps = [size - step for size, step in zip(kernel, stride, strict=True)]
        extents = [side * ratio for side, ratio in zip(latents.shape[2:], self._pixels_per_latent, strict=True)]
        video = tiles[0].new_zeros((1, self.vae.config.out_channels, *extents))
        places = product(*map(range, self._counts))
        for place, (t, y, x), tile in zip(places, self._windows(kernel, stride), tiles, strict=True):
            video[:, :, t, y, x] += _prepare_for_blend(*zip(place, self._counts, overlaps, strict=True), tile)
        return video.transpose(1, 2).contiguous()

    def spans(self, latents: Tensor) -> list[slice]:
        count, stride = latents.shape[2] * self._pixels_per_latent[0], self.vae.stride[0]
        return [slice(i, min(i + stride, count)) for i in range(0, count, stride)]

    def _windows(self, size: Sequence[int], stride: Sequence[int]) -> Iterator[tuple[slice, ...]]:
        for place in product(*map(range, self._counts)):
            yield tuple(slice(i * step, i * step + side) for i, step, side in zip(place, stride, size, strict=True))


class AllegroDecoder(WholeDecoder):
    """A single tile. Layers of images and of time alternate: the hidden state is `(B·F, C, H, W)`, of one sample."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.sliced = vae.use_slicing

    def count_frames(self, latent_frames: int) -> int:
        return latent_frames * 2 ** sum(up_block.add_temp_upsample for up_block in self.vae.decoder.up_blocks)

    def blocks(self, index: int) -> Sequence[Block]:
        decoder, middle = self.vae.decoder, self.vae.decoder.mid_block
        dtype = next(decoder.up_blocks.parameters()).dtype

        def enter(x: Tensor) -> Tensor:
            return _in_time(decoder.temp_conv_in)(decoder.conv_in(_images(x)))

        def leave(x: Tensor) -> Tensor:
            x = _in_time(decoder.temp_conv_out)(decoder.conv_act(decoder.conv_norm_out(x)))
            return _video(decoder.conv_out(x))

        layers = [enter, _resnet(middle.resnets[0]), _mixed(middle.temp_convs[0])]
        for attention, resnet, temp_conv in zip(
            middle.attentions, middle.resnets[1:], middle.temp_convs[1:], strict=True
        ):
            layers += [attention, _resnet(resnet), _mixed(temp_conv)]
        layers.append(lambda x: x.to(dtype))
        for up_block in decoder.up_blocks:
            for resnet, temp_conv in zip(up_block.resnets, up_block.temp_convs, strict=True):
                layers += [_resnet(resnet), _mixed(temp_conv)]
            layers += [_mixed(up_block.temp_conv_up)] if up_block.add_temp_upsample else []
            layers += up_block.upsamplers or ()
        return [stateless(layer) for layer in (*layers, leave)]


def _images(video: Tensor) -> Tensor:
    return video.permute(0, 2, 1, 3, 4).flatten(0, 1)


def _video(images: Tensor) -> Tensor:
    return images.unflatten(0, (1, -1)).permute(0, 2, 1, 3, 4)


def _in_time(convolution: Any) -> Callable[[Tensor], Tensor]:
    def call(images: Tensor) -> Tensor:
        video = _video(images)
        return _images(convolution(video) + video)

    return call


def _resnet(resnet: Any) -> Callable[[Tensor], Tensor]:
    return lambda images: resnet(images, temb=None)


def _mixed(temp_conv: Any) -> Callable[[Tensor], Tensor]:
    return lambda images: temp_conv(images, batch_size=1)

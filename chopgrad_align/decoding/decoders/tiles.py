"""Latents cut into overlapping tiles: each is decoded alone, then the pixels are blended by plain autograd.

Models decode in tiles to save memory; the pixels differ a little from those without tiles, so that the tiles are
followed wherever the model's own `decode` would use them. A tile is to the engine a small video of its own: only its
graph is alive in the backward pass. Blending is linear and keeps no activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Clamp, Decoder, Tiled

Blend = Callable[[Tensor, Tensor, int], Tensor]
"""`f(tile before, tile, extent) -> tile`: over the extent the tile before fades out."""


@dataclass(frozen=True)
class Cut:
    """How one axis of the latents is cut into tiles, and how the pixels of the tiles meet."""

    size: int
    """Latents of a tile."""
    stride: int
    """Latents from the start of a tile to the start of the next."""
    blend: int
    """Pixels (or frames) at the start of a tile over which the tile before it fades out."""
    keep: int
    """Pixels (or frames) that a tile shows."""


class SpatialTiles(Tiled):
    """Tiles over height and width, row by row, each with all frames.

    Args:
        inner: Decodes one tile.
        cuts: Of the height and of the width.
        scale: Pixels for each latent, if the model crops the result to the size that follows from the latents.
        finish: What the model does to the blended pixels.
        blend: How tiles blend downwards and to the right; default the model's own functions.
    """

    framewise = True

    def __init__(
        self,
        inner: Decoder,
        cuts: tuple[Cut, Cut],
        scale: int | None = None,
        finish: Callable[[Tensor, Clamp], Tensor] = lambda pixels, clamp: pixels,
        blend: Sequence[Blend] | None = None,
    ) -> None:
        super().__init__(inner)
        self._decoder = inner
        self._height, self._width = cuts
        self._scale, self._finish = scale, finish
        blends: Sequence[Blend] = blend or (inner.vae.blend_v, inner.vae.blend_h)
        self._blend_v, self._blend_h = blends

    def tiles(self, latents: Tensor) -> list[Tensor]:
        height, width = self._height, self._width
        return [
            latents[..., i : i + height.size, j : j + width.size]
            for i in range(0, latents.shape[-2], height.stride)
            for j in range(0, latents.shape[-1], width.stride)
        ]

    def join(self, tiles: list[Tensor], latents: Tensor, clamp: Clamp) -> Tensor:
        height, width = self._height, self._width
        columns = len(range(0, latents.shape[-1], width.stride))
        rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
        strips = []
        for i, row in enumerate(rows):
            for j in range(columns):
                # Written back, because the next tiles blend with a tile that is blended already.
                if i > 0:
                    row[j] = self._blend_v(rows[i - 1][j], row[j], height.blend)
                if j > 0:
                    row[j] = self._blend_h(row[j - 1], row[j], width.blend)
            strips.append(torch.cat([tile[..., : height.keep, : width.keep] for tile in row], -1))
        pixels = torch.cat(strips, -2)
        if self._scale is not None:
            pixels = pixels[..., : latents.shape[-2] * self._scale, : latents.shape[-1] * self._scale]
        return self._finish(pixels, clamp)

    def spans(self, latents: Tensor) -> list[slice]:
        return [group.frames for group in self._decoder.groups(self.tiles(latents)[0])]


class TemporalTiles(Tiled):
    """Tiles over time: a tile has one more latent frame than `cut.size`, and all but the first drop one frame.

    Args:
        inner: Decodes one tile.
        cut: Of the time axis.
        scale: Frames for each latent frame after the first.
        dropped: Which frame the later tiles drop: 0 the first, -1 the last.
    """

    framewise = False

    def __init__(self, inner: Decoder | SpatialTiles, cut: Cut, scale: int, dropped: int) -> None:
        super().__init__(inner)
        self._cut, self._scale = cut, scale
        self._kept = slice(1, None) if dropped == 0 else slice(None, -1)

    def tiles(self, latents: Tensor) -> list[Tensor]:
        starts = range(0, latents.shape[2], self._cut.stride)
        return [latents[:, :, i : i + self._cut.size + 1] for i in starts]

    def join(self, tiles: list[Tensor], latents: Tensor, clamp: Clamp) -> Tensor:
        cut = self._cut
        before, *later = tiles
        shown = [before[:, :, : cut.keep + 1]]
        for tile in later:
            before = self.vae.blend_t(before, tile[:, :, self._kept], cut.blend)
            shown.append(before[:, :, : cut.keep])
        return torch.cat(shown, 2)[:, :, : self._frames(latents)]

    def spans(self, latents: Tensor) -> list[slice]:
        count = self._frames(latents)
        starts = [0, *range(1 + self._cut.keep, count, self._cut.keep)]
        return [slice(i, j) for i, j in zip(starts, [*starts[1:], count], strict=True)]

    def _frames(self, latents: Tensor) -> int:
        return (latents.shape[2] - 1) * self._scale + 1


def larger(latents: Tensor, cuts: tuple[Cut, Cut]) -> bool:
    """True if latents are higher or wider than one tile."""
    return latents.shape[-2] > cuts[0].size or latents.shape[-1] > cuts[1].size


def strided_cuts(vae: Any, patch: int = 1) -> tuple[Cut, Cut]:
    """Tiles of a VAE that has a size and a stride in pixels (`tile_sample_min_height`, `tile_sample_stride_height`).

    `patch` is the side of the squares of pixels that the model takes apart and blends as channels.
    """
    ratio = vae.spatial_compression_ratio
    return (
        _strided(vae.tile_sample_min_height, vae.tile_sample_stride_height, ratio, patch),
        _strided(vae.tile_sample_min_width, vae.tile_sample_stride_width, ratio, patch),
    )


def strided_time_cut(vae: Any) -> Cut:
    """Tiles over time of a VAE that has `tile_sample_min_num_frames` and `tile_sample_stride_num_frames`."""
    return _strided(vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames, vae.temporal_compression_ratio)


def _strided(size: int, stride: int, ratio: int, patch: int = 1) -> Cut:
    keep = stride // patch
    return Cut(size // ratio, stride // ratio, size // patch - keep, keep)


def overlapping_cut(latent_size: int, pixel_size: int, overlap: float) -> Cut:
    """Tiles that overlap by a fraction of their size."""
    blend = int(pixel_size * overlap)
    return Cut(latent_size, int(latent_size * (1 - overlap)), blend, pixel_size - blend)


def in_overlapping_tiles(decoder: Decoder, latents: Tensor, overlap: tuple[float, float]) -> Decoder | SpatialTiles:
    """The decoder, in tiles that overlap by a fraction of their height and of their width if its model would use them.

    For a VAE that has the size of a tile in latents and in pixels (`tile_latent_min_height`, `tile_sample_min_height`).
    """
    vae = decoder.vae
    cuts = (
        overlapping_cut(vae.tile_latent_min_height, vae.tile_sample_min_height, overlap[0]),
        overlapping_cut(vae.tile_latent_min_width, vae.tile_sample_min_width, overlap[1]),
    )
    return SpatialTiles(decoder, cuts) if vae.use_tiling and larger(latents, cuts) else decoder

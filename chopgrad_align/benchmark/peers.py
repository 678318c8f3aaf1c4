"""How other projects get a gradient from decoded pixels, each written here from its description.

They are rows like the policies: `f(vae, latents, loss) -> gradient` of what *they* take for the loss of the clip, which
is compared with the gradient of the loss itself. Where a way leaves a choice, the one that is kinder to it is made.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..decoding.backprop import Full
from ..decoding.decode import FrameLoss, decode
from .cases import units_of
from .rows import Method, gradient, loss_of


def one_frame(vae: nn.Module, latents: Tensor, loss: FrameLoss) -> Tensor:
    """The loss of a single frame, the one in the middle (VADER, arXiv 2407.08737, which draws it at random).

    Kindly: the frame is decoded with its whole past, not from its own latent alone.
    """
    units = units_of(vae, latents)
    index = units[-1].frames.stop // 2
    return gradient(latents, lambda z: loss(decode(vae, z, Full(), frames=[index]), slice(index, index + 1)))


def first_latents(count: int) -> Method:
    """The loss of the frames that the first latents give when they are decoded alone (VideoX-Fun's reward training)."""

    def method(vae: nn.Module, latents: Tensor, loss: FrameLoss) -> Tensor:
        return gradient(latents, lambda z: loss_of(decode(vae, z[:, :, :count], Full()), loss))

    return method


def each_alone(vae: nn.Module, latents: Tensor, loss: FrameLoss) -> Tensor:
    """Every latent decoded alone, as if it were an image, and the losses added (DOVE, arXiv 2505.16239).

    An image stands for the last of the frames that its latent encodes. Kindly: one graph at a time.
    """
    total = torch.zeros_like(latents)
    for unit in units_of(vae, latents):
        stop, length = unit.frames.stop, unit.frames.stop - unit.frames.start

        def evaluate(z: Tensor, stop: int = stop, length: int = length) -> Tensor:
            pixels = decode(vae, z, Full())[:, :, -length:]
            return loss(pixels, slice(stop - pixels.shape[2], stop))

        total[:, :, unit.latents] = gradient(latents[:, :, unit.latents], evaluate)
    return total


def spatial_tiles(vae: nn.Module, latents: Tensor, loss: FrameLoss) -> Tensor:
    """Whole clip, in two by two overlapping tiles that are recomputed one at a time (UniRL)."""

    def decode_tile(tile: Tensor) -> Tensor:
        return decode(vae, tile, Full())

    def evaluate(z: Tensor) -> Tensor:
        blended = weights = z.new_zeros(())
        for rows in _halves(z.shape[-2]):
            for columns in _halves(z.shape[-1]):
                pixels = checkpoint(decode_tile, z[..., rows, columns], use_reentrant=False)
                scale = pixels.shape[-1] // (columns.stop - columns.start)
                place = (
                    columns.start * scale,
                    (z.shape[-1] - columns.stop) * scale,
                    rows.start * scale,
                    (z.shape[-2] - rows.stop) * scale,
                )
                fade = _tent(pixels.shape[-2], z)[:, None] * _tent(pixels.shape[-1], z)
                blended = blended + torch.nn.functional.pad(pixels * fade, place)
                weights = weights + torch.nn.functional.pad(fade, place)
        return loss_of(blended / weights, loss)

    return gradient(latents, evaluate)


def _halves(extent: int) -> tuple[slice, slice]:
    """Two spans that overlap by a quarter."""
    size = math.ceil(0.625 * extent)
    return slice(0, size), slice(extent - size, extent)


def _tent(extent: int, like: Tensor) -> Tensor:
    """Weights that rise linearly from both ends: normalised where tiles overlap, they blend linearly."""
    ramp = torch.arange(1, extent + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(ramp, ramp.flip(0))


PEERS: dict[str, Method] = {
    "one frame (VADER)": one_frame,
    "first latent (VideoX-Fun)": first_latents(1),
    "first 3 latents (VideoX-Fun)": first_latents(3),
    "each latent alone (DOVE)": each_alone,
    "spatial tiles (UniRL)": spatial_tiles,
}

"""Decode latents to pixels, with a gradient whose memory does not grow with the number of frames."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..common.errors import UsageError
from .backprop import Backprop, Exact, Truncated, expect_policy
from .decoders import decoder_of
from .decoders.base import Decoder, Group, Tiled
from .recurrence import Recurrence

FrameLoss = Callable[[Tensor, slice], Tensor]


def decode(
    vae: nn.Module,
    latents: Tensor,
    backprop: Backprop = Exact(),  # noqa: B008 (frozen)
    frames: slice | Sequence[int] | None = None,
    **decode_kwargs: Any,
) -> Tensor:
    """Decode latents to pixels, bit for bit as `vae.decode(latents).sample`, with a gradient by the given policy.

    The gradient reaches `latents` and every weight of the VAE that requires one. Slicing and tiling are followed where
    the VAE has them switched on.

    Args:
        vae: One of the known diffusers decoders (`chopgrad_align.decoding.decoders`).
        latents: As the VAE's own `decode` takes them: `(B, C, F', H', W')`, or for decoders of single frames also
            `(N, C, H', W')`.
        backprop: `Exact()`, `Truncated(distance)`, `Full()`, or a policy of your own (`chopgrad_align.Backprop`).
        frames: The pixel frames to return, in this order; default all. Groups that they do not need are not computed.
        decode_kwargs: Further arguments of the VAE's own `decode`, as `num_frames` of Stable Video Diffusion.

    Returns:
        Pixels in the decoder's range, about [-1, 1], as the VAE lays them out: `(B, C, F, H, W)`, or `(N, C, H, W)` for
        latents like that, or `(B, F, C, H, W)` by AutoencoderKLAllegro.

    Raises:
        UsageError: An unknown decoder or policy, latents, frames or arguments that do not fit it, or a mode of it that
            has no gradient here; in the backward pass: weights that changed since the forward pass, or a second
            derivative.
    """
    expect_policy("decode", backprop)
    decoder = decoder_of(vae, latents, **decode_kwargs)
    if not decoder.sliced or len(latents) == 1:
        return _decode(decoder, latents, backprop, frames)
    return torch.cat([_decode(decoder, piece, backprop, frames) for piece in latents.split(1)])


def _decode(
    decoder: Decoder | Tiled, latents: Tensor, backprop: Backprop, frames: slice | Sequence[int] | None
) -> Tensor:
    if isinstance(decoder, Tiled):
        return _decode_tiles(decoder, latents, backprop, frames)
    groups = decoder.groups(latents)
    if frames is None:
        recurrence = Recurrence(decoder, groups, backprop.clamp(), [True] * len(groups))
        return backprop.run(recurrence, decoder.prologue(latents))
    wanted = _frame_indices(frames, groups[-1].frames.stop)
    groups = _independent_frames(decoder, latents)
    indices = [range(group.frames.start, group.frames.stop) for group in groups]
    shown = [any(i in span for i in wanted) for span in indices]
    needed = len(shown) - shown[::-1].index(True)
    recurrence = Recurrence(decoder, groups[:needed], backprop.clamp(), shown[:needed])
    pixels = backprop.run(recurrence, decoder.prologue(latents))
    made = [i for span, show in zip(indices, shown, strict=True) if show for i in span]
    return _select(pixels, decoder.time_axis, [made.index(i) for i in wanted])


def _decode_tiles(decoder: Tiled, latents: Tensor, backprop: Backprop, frames: slice | Sequence[int] | None) -> Tensor:
    chosen = frames if decoder.framewise else None
    tiles = [_decode(decoder.inner, tile, backprop, chosen) for tile in decoder.tiles(latents)]
    pixels = decoder.join(tiles, latents, backprop.clamp())
    if frames is None or decoder.framewise:
        return pixels
    return _select(pixels, decoder.time_axis, _frame_indices(frames, pixels.shape[decoder.time_axis]))


def _independent_frames(decoder: Decoder, latents: Tensor) -> list[Group]:
    return [part for group in decoder.groups(latents) for part in decoder.independent_frames(group)]


def _select(pixels: Tensor, axis: int, frames: list[int]) -> Tensor:
    return pixels.index_select(axis, torch.tensor(frames, device=pixels.device))


def _frame_indices(frames: slice | Sequence[int], count: int) -> list[int]:
    if isinstance(frames, slice):
        indices = list(range(count)[frames])
    else:
        try:
            indices = [i + count if -count <= i < 0 else i for i in map(operator.index, frames)]
        except TypeError:
            raise UsageError(
                f"decode: frames={frames!r}: expected a slice or a list of numbers of frames, such as [0, 8, 16]"
            ) from None
    if not indices or not all(0 <= i < count for i in indices):
        raise UsageError(f"decode: frames={frames!r} must name at least one of the {count} frames, counted from 0")
    return indices


def decode_loss(
    vae: nn.Module,
    latents: Tensor,
    frame_loss: FrameLoss,
    backprop: Backprop = Truncated(0),  # noqa: B008 (frozen)
    **decode_kwargs: Any,
) -> Tensor:
    """The sum over frame groups of a loss on decoded pixels, without ever holding all pixels.

    With `Truncated(0)` the gradient is taken during the forward pass, group by group: F + B, the graph and the pixels
    of one group alive at a time. The other policies take it in the backward pass as `decode` does, with the loss
    evaluated again beside each group; so does `Truncated(0)` in float16, which needs the loss's scale. Where the VAE
    decodes in tiles or, by `enable_slicing`, sample by sample, all pixels must be there before they come together: then
    they are held, and the loss is taken of one piece at a time, evaluated again in the backward pass.

    Args:
        vae, latents, backprop, decode_kwargs: As for `decode`.
        frame_loss: `frame_loss(pixels, frame_index) -> scalar`; `frame_index` is the slice of frames that the pixels
            are, `(B, C, f, H, W)`, or `(f, C, H, W)` for latents `(N, C, H', W')`, or `(B, f, C, H, W)` by
            AutoencoderKLAllegro. It may be called twice a group, so it must be a function of its arguments. Other
            tensors that it uses receive no gradient.

    Returns:
        A scalar with a gradient to `latents` and to every weight of the VAE that requires one.
    """
    expect_policy("decode_loss", backprop)
    decoder = decoder_of(vae, latents, **decode_kwargs)
    evaluate = partial(_checked_loss, frame_loss)
    if isinstance(decoder, Tiled) or (decoder.sliced and len(latents) > 1):
        pixels, spans = decode(vae, latents, backprop, **decode_kwargs), decoder.spans(latents)
        pieces = pixels.split([span.stop - span.start for span in spans], decoder.time_axis)
        losses = [checkpoint(evaluate, *piece, use_reentrant=False) for piece in zip(pieces, spans, strict=True)]
        return torch.stack(losses).sum()
    groups = _independent_frames(decoder, latents)

    def group_loss(group: Group, pixels: Tensor) -> Tensor:
        return evaluate(pixels, group.frames)

    recurrence = Recurrence(decoder, groups, backprop.clamp(), [True] * len(groups), group_loss)
    return backprop.run(recurrence, decoder.prologue(latents))


def _checked_loss(frame_loss: FrameLoss, pixels: Tensor, frames: slice) -> Tensor:
    loss = frame_loss(pixels, frames)
    if not isinstance(loss, Tensor) or loss.shape != ():
        came = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UsageError(f"decode_loss: frame_loss must return a scalar tensor, got {came}; sum over the batch")
    if pixels.requires_grad and not loss.requires_grad:
        raise UsageError("decode_loss: frame_loss returned a value that has no gradient to the pixels")
    return loss

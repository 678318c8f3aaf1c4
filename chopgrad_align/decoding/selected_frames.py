"""Decode only the frames that some reward reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .backprop import Backprop
from .decode import decode
from .decoders import decoder_of


def decode_selected_frames(
    vae: nn.Module,
    latents: Tensor,
    backprop: Backprop,
    *,
    read: Callable[[int], list[int]],
    expected: int | None,
    **decode_kwargs: Any,
) -> Tensor:
    """All pixels as `decode` returns them, with NaN in place of the frames that nobody reads.

    So the pipeline's own code runs on after it as ever, and a reward that reads more than it says is found out.

    Args:
        vae, latents, backprop, decode_kwargs: As for `decode`.
        read: `f(number of frames) -> frames`: those that are read, in order.
        expected: The number of frames that the pipeline was asked for. Where one call of the decoder makes another
            number (a chunk of the video, or frames that are cut off later), all are decoded.
    """
    decoder = decoder_of(vae, latents, **decode_kwargs)
    total = decoder.spans(latents)[-1].stop
    frames = read(total)
    if latents.ndim == 4 or total != expected or len(frames) == total:
        return decode(vae, latents, backprop, **decode_kwargs)
    pixels = decode(vae, latents, backprop, frames, **decode_kwargs)
    axis = decoder.time_axis
    whole = pixels.new_full((*pixels.shape[:axis], total, *pixels.shape[axis + 1 :]), torch.nan)
    return whole.index_copy(axis, torch.tensor(frames, device=pixels.device), pixels)

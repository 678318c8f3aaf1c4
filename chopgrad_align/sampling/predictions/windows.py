"""Videos longer than a model's window: overlapping windows, each of which is given what the one before it made.

The frames that two windows share are encoded again and take the place of the first latents of the second one, so that
it goes on from them (latent replacement, as in Vista, arXiv 2405.17398); then the two fade into each other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...common.errors import UsageError
from .protocol import Videos


def windows(total: int, window: int, overlap: int) -> list[slice]:
    """The frames of each window; the last one ends with the video and can overlap more than the others.

    Raises:
        UsageError: The windows would not advance, or the video is shorter than one.
    """
    if not 0 < overlap < window <= total:
        raise UsageError(
            f"expected an overlap from 1 to {window - 1} frames and a video of {window} or more, "
            f"got {overlap} and {total}"
        )
    starts = [*range(0, total - window, window - overlap), total - window]
    return [slice(start, start + window) for start in starts]


def predict_long(
    predict: Callable[[dict[str, Tensor]], Tensor], videos: Videos, window: int, overlap: int, stride: int
) -> Tensor:
    """Predict a long video window by window.

    Args:
        predict: From the videos of one window to its prediction `(B, window, 3, H, W)`. After the first window there is
            the role `context`, the frames that were predicted already, as many as the encoder takes.
        videos: `(B, F, C, H, W)` for each role; what has another number of frames, such as a picture, is given whole.
        window: Frames of a window.
        overlap: Frames that two windows share.
        stride: Frames for each latent frame after the first.

    Returns:
        `(B, F, 3, H, W)`.
    """
    total = max(video.shape[1] for video in videos.values())
    made: Tensor | None = None
    for span in windows(total, window, overlap):
        part = {role: video[:, span] if video.shape[1] == total else video for role, video in videos.items()}
        if made is None:
            made = predict(part)
            continue
        shared = made[:, span.start :]
        whole = (shared.shape[1] - 1) // stride * stride + 1
        predicted = predict(part | {"context": shared[:, :whole]})
        count = shared.shape[1]
        fade = torch.linspace(0, 1, count + 2, device=made.device)[1:-1].view(1, -1, 1, 1, 1)
        blended = torch.lerp(shared, predicted[:, :count], fade)
        made = torch.cat([made[:, : span.start], blended, predicted[:, count:]], 1)
    assert made is not None
    return made

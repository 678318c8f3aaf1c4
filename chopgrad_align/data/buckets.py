"""Shapes that clips come in, and how footage of any shape is cut to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..common.errors import UsageError

Crop = Literal["center", "random", "native"]

# Boxes begin at multiples of this: whole pixels in a version of the video that is 2, 4 or 8 times smaller, too.
_GRID = 8


@dataclass(frozen=True, order=True)
class Bucket:
    """Frames, height and width of a clip."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise UsageError(f"expected a bucket (frames, height, width) of positive numbers, got {self}")

    @property
    def arguments(self) -> dict[str, int]:
        """Arguments of a pipeline's call."""
        return {"num_frames": self.frames, "height": self.height, "width": self.width}


@dataclass(frozen=True)
class Box:
    """A part of the picture, in fractions of its height and width: the same part of every version of a video."""

    top: float
    left: float
    height: float
    width: float


def choose_bucket(buckets: Sequence[Bucket], frames: int, height: int, width: int) -> Bucket | None:
    """The bucket whose shape is nearest to the footage's, of those that it is long enough for; None if there are none.

    Of equal shapes it is the longest, then the largest that needs no enlarging, or else the smallest.
    """

    def unlikeness(bucket: Bucket) -> tuple[float, int, bool, int]:
        shape = abs(math.log(bucket.width / bucket.height) - math.log(width / height))
        enlarged = bucket.height > height or bucket.width > width
        area = bucket.height * bucket.width
        return round(shape, 2), -bucket.frames, enlarged, area if enlarged else -area

    return min((b for b in buckets if b.frames <= frames), key=unlikeness, default=None)


def crop_box(bucket: Bucket, height: int, width: int, crop: Crop, place: tuple[float, float]) -> Box:
    """The part of a picture `height` x `width` that becomes a clip.

    Args:
        bucket: Gives the shape.
        height: Of the picture, in pixels.
        width: Likewise.
        crop: `center`: as much as fits of the bucket's shape, from the middle. `random`: as much, from `place`.
            `native`: exactly as many pixels as the bucket has, so that nothing is resized, from `place`; where the
            picture has fewer, as `random`.
        place: Down and to the right, 0 to 1.
    """
    scale = min(height / bucket.height, width / bucket.width)
    if crop == "native":
        scale = min(scale, 1.0)
    rows, columns = (
        min(round(scale * size), limit)
        for size, limit in zip((bucket.height, bucket.width), (height, width), strict=True)
    )
    down, right = (0.5, 0.5) if crop == "center" else place
    top, left = (int(part * free) // _GRID * _GRID for part, free in ((down, height - rows), (right, width - columns)))
    return Box(top / height, left / width, rows / height, columns / width)


def cut(frame: Tensor, box: Box, height: int, width: int) -> Tensor:
    """Cut `(C, H, W)` in [0, 1] to a box and resize it (bicubic, low-passed where it shrinks): `(C, height, width)`."""
    top, left = round(box.top * frame.shape[1]), round(box.left * frame.shape[2])
    rows, columns = max(round(box.height * frame.shape[1]), 1), max(round(box.width * frame.shape[2]), 1)
    part = frame[:, top : top + rows, left : left + columns]
    return resize(part[None], height, width)[0]


def resize(video: Tensor, height: int, width: int) -> Tensor:
    """Bicubic, with a low-pass where it shrinks: `(F, C, H, W)` in [0, 1] to `(F, C, height, width)`."""
    if video.shape[2:] == (height, width):
        return video
    return F.interpolate(video, (height, width), mode="bicubic", antialias=True).clamp(0, 1)

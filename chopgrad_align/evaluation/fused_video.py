"""Videos of one scene fused into one, side by side: whatever plays it, they cannot drift apart."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image

from ..common.errors import UsageError
from ..data.video import encode_video

_GAP = 4  # pixels between videos
_SMALLEST = 192  # pixels: a narrower video is enlarged by a whole factor, pixel by pixel, to be at least as wide
_QUALITY = "20"  # x264's constant rate factor


@dataclass(frozen=True)
class FusedVideo:
    """Videos side by side.

    Attributes:
        mp4: The file.
        poster: Its first frame as a JPEG file.
        size: Width and height, in pixels.
        gap: Between two videos, in pixels.
        enlarged: Whether each pixel is a square of several.
    """

    mp4: bytes
    poster: bytes
    size: tuple[int, int]
    gap: int
    enlarged: bool


def fuse(paths: Sequence[Path], widest: int, most_bytes: int) -> FusedVideo:
    """Fuse video files, frame by frame, from left to right; the shortest one decides the length.

    Args:
        paths: At least one. All are brought to the size of the first.
        widest: A wider video is averaged down to so many pixels, an even number.
        most_bytes: The mp4's quality is lowered until it is about so large at most.

    Raises:
        UsageError: A file is not a video.
    """
    with ExitStack() as stack:
        readers = [stack.enter_context(_opened(path)) for path in paths]
        stream = readers[0].streams.video[0]
        width, height = _size(stream.width, stream.height, widest)
        fps = float(stream.average_rate or 8)
        seconds = max((stream.frames or 1) / fps, 0.1)
        columns = (_frames(reader, path, width, height) for reader, path in zip(readers, paths, strict=True))
        gap = np.zeros((height, _GAP, 3), np.uint8)
        pictures = (_joined(row, gap) for row in zip(*columns, strict=False))
        first = next(pictures, None)
        if first is None:
            raise UsageError(f"{paths[0]} has no frames; delete it and write the report again")
        path = Path(stack.enter_context(TemporaryDirectory()), "fused.mp4")
        # A rate that cannot be exceeded for longer than the buffer: half of the bytes by rate, half to begin with.
        rate = {"maxrate": f"{4 * most_bytes / seconds:.0f}", "bufsize": f"{4 * most_bytes}"}
        encode_video(path, chain([first], pictures), fps, {"crf": _QUALITY, **rate})
        mp4 = path.read_bytes()
    poster = io.BytesIO()
    Image.fromarray(first).save(poster, "jpeg", quality=75)
    return FusedVideo(mp4, poster.getvalue(), (first.shape[1], first.shape[0]), _GAP, width > stream.width)


def _size(width: int, height: int, widest: int) -> tuple[int, int]:
    """Even width and height of a column."""
    if width > widest:
        return widest, max(2, 2 * round(height * widest / width / 2))
    factor = math.ceil(min(_SMALLEST, widest) / width)
    return width * factor // 2 * 2, height * factor // 2 * 2


def _opened(path: Path) -> av.container.InputContainer:
    try:
        container = av.open(str(path))
        if not container.streams.video:
            container.close()
            raise UsageError(f"{path} is not a video; delete it and write the report again")
        return container
    except (OSError, av.error.FFmpegError) as error:
        raise UsageError(f"{path} is not a video; delete it and write the report again") from error


def _frames(container: av.container.InputContainer, path: Path, width: int, height: int) -> Iterator[np.ndarray]:
    """The frames `(height, width, 3)`, uint8."""
    try:
        for frame in container.decode(video=0):
            if frame.width > width or frame.height > height:
                yield frame.reformat(width, height, "rgb24", interpolation=Interpolation.AREA).to_ndarray()
                continue
            pixels = frame.to_ndarray(format="rgb24")
            rows, columns = (np.arange(n) * m // n for n, m in ((height, frame.height), (width, frame.width)))
            yield pixels[rows][:, columns]
    except av.error.FFmpegError as error:
        raise UsageError(f"{path} is not a whole video; delete it and write the report again") from error


def _joined(row: Sequence[np.ndarray], gap: np.ndarray) -> np.ndarray:
    return np.hstack([part for frame in row for part in (gap, frame)][1:])

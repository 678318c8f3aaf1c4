"""Pictures as footage: a folder (or list) of numbered frames, and a single still."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .source import STILL_SUFFIXES, BadFile, Content, Source, fetch


@dataclass(frozen=True)
class FrameFolder:
    """A folder of equally large pictures in the order of the numbers in their names, or a list of pictures."""

    source: Source
    name: str
    background: float
    height: int
    width: int
    fps: float
    seconds: float

    @staticmethod
    def open(source: Source, name: str, fps: float, background: float) -> FrameFolder:
        pictures = _pictures(source)
        if not pictures:
            raise BadFile("unreadable", name, f"a folder without frames ({', '.join(sorted(STILL_SUFFIXES))})")
        sizes = {_size(picture, name) for picture in (pictures[0], pictures[-1])}
        if len(sizes) > 1:
            raise BadFile("unreadable", name, f"its frames have different sizes: {sorted(sizes)}; make them equal")
        ((height, width),) = sizes
        return FrameFolder(source, name, background, height, width, fps, len(pictures) / fps)

    def frames_at(self, times: Sequence[float]) -> Iterator[Tensor]:
        """See `Footage.frames_at`."""
        pictures = _pictures(self.source)
        for time in times:
            # A quarter of a frame of slack: n / fps * fps can come out below n.
            frame = _read(pictures[min(int(time * self.fps + 0.25), len(pictures) - 1)], self.name, self.background)
            if frame.shape[1:] != (self.height, self.width):
                raise BadFile("unreadable", self.name, f"a frame has size {tuple(frame.shape[1:])}; make them equal")
            yield frame


@dataclass(frozen=True)
class Still:
    """A picture, shown for ever: a mask that does not move, or a reference image."""

    source: Source
    name: str
    background: float
    height: int
    width: int
    fps: float = math.inf
    seconds: float = math.inf

    @staticmethod
    def open(source: Source, name: str, background: float) -> Still:
        height, width = _size(_pictures(source)[0], name)
        return Still(source, name, background, height, width)

    def frames_at(self, times: Sequence[float]) -> Iterator[Tensor]:
        """See `Footage.frames_at`."""
        frame = _read(_pictures(self.source)[0], self.name, self.background)
        for _ in times:
            yield frame


def _pictures(source: Source) -> list[Content]:
    content = fetch(source)
    if isinstance(content, list):
        return content
    if not (isinstance(content, Path) and content.is_dir()):
        return [content]
    found = [path for path in content.iterdir() if path.suffix.lower() in STILL_SUFFIXES]
    return [*sorted(found, key=lambda path: _natural(path.name))]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which frame9 comes before frame10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


@contextmanager
def _opened(picture: Content, name: str) -> Iterator[Image.Image]:
    """A picture, upright; what is raised in the block is a `BadFile`."""
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            yield ImageOps.exif_transpose(image)  # a camera's rotation flag
    # Pillow names no errors for broken files: its readers raise OSError, SyntaxError, ValueError, TypeError, KeyError,
    # struct.error, … as they run into them, and not the same ones in the next version.
    except Exception as error:
        place = picture.name if isinstance(picture, Path) else "a picture"
        raise BadFile("unreadable", name, f"{place}: {str(error) or type(error).__name__}") from None


def _size(picture: Content, name: str) -> tuple[int, int]:
    with _opened(picture, name) as image:
        return image.height, image.width


def _read(picture: Content, name: str, background: float) -> Tensor:
    with _opened(picture, name) as image:
        if image.mode.startswith("I;16"):  # 16-bit grey, as depth maps are; PIL's own conversion would clip it
            grey = torch.from_numpy(np.asarray(image).astype(np.float32)) / 65535
            return grey.expand(3, -1, -1)
        pixels = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1).float() / 255
    return over(pixels, background)


def over(pixels: Tensor, background: float) -> Tensor:
    """Lay `(4, H, W)` with straight alpha over a grey background: `(3, H, W)`."""
    return torch.lerp(torch.full_like(pixels[:3], background), pixels[:3], pixels[3:])

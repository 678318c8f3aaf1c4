"""The source that a clip is cut from: a video file, a folder of frames or a still, read lazily.

Nothing of the pixels is kept: `Footage` holds what must be known to cut a clip (length, rate, size), and reads the
frames that are asked for when they are asked for.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor

from .source import BadFile, Content, Source, fetch, is_still
from .stills import FrameFolder, Still
from .video_file import VideoFile


class Footage(Protocol):
    """Frames in time, upright, in square pixels."""

    @property
    def name(self) -> str:
        """Name in messages."""

    @property
    def height(self) -> int:
        """In pixels."""

    @property
    def width(self) -> int:
        """In pixels."""

    @property
    def fps(self) -> float:
        """Frames a second: the file's own, or its average; infinite for a still."""

    @property
    def seconds(self) -> float:
        """Duration from the first frame to the end of the last; infinite for a still."""

    def frames_at(self, times: Sequence[float]) -> Iterator[Tensor]:
        """The frame that is shown at each time: float32 `(3, height, width)` in [0, 1].

        Args:
            times: In seconds from the first frame, ascending, in [0, seconds).

        Raises:
            BadFile: A frame cannot be read.
        """


def open_footage(source: Source, name: str, folder_fps: float = 24.0, background: float = 0.0) -> Footage:
    """Look at a source without reading all of it.

    Args:
        source: A path (a folder is read as frames), or a function that fetches a cell of a table.
        name: What messages call it.
        folder_fps: Frames a second of a folder or list of frames, which says none itself.
        background: Grey level, 0 black to 1 white, that shows through where a file has transparent pixels.

    Raises:
        BadFile: Nothing can be read from it.
    """
    content = fetch(source)
    # `os.path`, because `Path.exists` raises for what is too long for a name, such as a caption in the wrong column.
    if isinstance(content, Path) and not os.path.exists(content):
        raise BadFile("missing", name, f"no such file{_in_other_letters(content)}; paths are relative to the metadata")
    if isinstance(content, list) or (isinstance(content, Path) and content.is_dir()):
        return FrameFolder.open(source, name, folder_fps, background)
    if not (is_still(content) or _is_gif(content)):
        return VideoFile.open(source, name, background)
    animation = _animation(content)
    if animation == "WEBP":
        raise BadFile("animation", name, "FFmpeg does not decode animated WebP; save it as GIF, APNG or mp4")
    return VideoFile.open(source, name, background) if animation else Still.open(source, name, background)


def _is_gif(content: Content) -> bool:
    return content.suffix.lower() == ".gif" if isinstance(content, Path) else content.startswith(b"GIF8")


def _animation(content: Content) -> str | None:
    """Format of a picture that moves; None for one that does not, or that cannot be read."""
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            moves = image.format in ("GIF", "PNG", "WEBP") and getattr(image, "is_animated", False)
            return image.format if moves else None
    except Exception:  # Pillow names no errors for broken files; `Still` reports them
        return None


def _in_other_letters(path: Path) -> str:
    """A hint at a file whose name differs in capitals alone."""
    try:
        names = os.listdir(path.parent)
    except (OSError, ValueError):
        return ""
    found = next((name for name in names if name.casefold() == path.name.casefold()), None)
    return f", but {found}" if found else ""

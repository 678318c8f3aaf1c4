"""The place of the bytes of a video or picture: a path, or a cell of a table that is fetched when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

# A file or a folder of frames, or what fetches one: a cell of a table that is not held in memory. A list is frames.
Content = Path | bytes
Source = Path | Callable[[], Content | list[Content]]

STILL_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_STILL_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"BM")


@dataclass(frozen=True)
class Row:
    """A sample of a data set: a caption, and a source for each role that the data set has.

    Roles: `target`, always; `degraded`, `mask` (white where something is to be made), `control`, `image`, or a name of
    the user's own.
    """

    name: str
    caption: str
    sources: Mapping[str, Source]


class BadFile(Exception):
    """A file that no clip can be cut from.

    Args:
        kind: One word or two, by which they are counted, such as `unreadable` or `audio only`.
        name: Of the file.
        reason: What is wrong with it and what can be done.
    """

    def __init__(self, kind: str, name: str, reason: str) -> None:
        super().__init__(f"{name} ({kind}: {reason})")
        self.kind, self.name, self.reason = kind, name, reason


def fetch(source: Source) -> Content | list[Content]:
    """The content of a source, from the table if it is a cell of one."""
    return source if isinstance(source, Path) else source()


def is_still(content: Content) -> bool:
    """Tell whether this is a picture: a path by its suffix, bytes by their first ones."""
    if isinstance(content, Path):
        return content.suffix.lower() in STILL_SUFFIXES
    return content.startswith(_STILL_MAGIC) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")

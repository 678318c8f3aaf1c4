"""The place of the bytes of a video or picture: a path, or a cell of a table that is fetched when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

# A file or a folder of frames, or what fetches one: a cell of a table that is not held in memory. A list is frames.
Content = Path | bytes
Source = Path | Callable[[], Content | list[Content]]

STILL_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
VIDEO_SUFFIXES = frozenset(
    {
        *(".3g2", ".3gp", ".asf", ".avi", ".f4v", ".flv", ".gif", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4"),
        *(".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m"),
    }
)
MEDIA_SUFFIXES = STILL_SUFFIXES | VIDEO_SUFFIXES

_NAMED = 3  # of each kind in a summary
_STILL_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"BM")


@dataclass(frozen=True)
class Row:
    """A sample of a data set: a caption, and a source for each role that the data set has.

    Roles: `target`; `degraded`, `mask` (white where something is to be made), `control`, `image`, or a name of the
    user's own. `identity` is equal for samples whose target is of the same footage.
    """

    name: str
    caption: str
    sources: Mapping[str, Source]
    identity: Hashable = None


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


def counted(named: Iterable[tuple[str, str]]) -> str:
    """How many names there are with each reason, the most first, in one line: `2 hidden (.a.mp4, .b.mp4); 1 …`."""
    names: dict[str, list[str]] = {}
    for reason, name in named:
        names.setdefault(reason, []).append(name)
    return "; ".join(
        f"{len(of)} {reason} ({', '.join(of[:_NAMED])}{', …' if len(of) > _NAMED else ''})"
        for reason, of in sorted(names.items(), key=lambda item: -len(item[1]))
    )

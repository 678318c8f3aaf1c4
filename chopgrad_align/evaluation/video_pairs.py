"""Videos of two folders, paired by their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from ..common.errors import UsageError
from ..data.clips import Clip
from ..data.footage import open_footage
from ..data.source import BadFile, Source
from ..data.videofolder import read_folder
from .compare import Method


class VideoPairs:
    """The videos of a folder of targets as clips, and those of other folders with the same names as methods.

    A name is the path below the folder without its suffix; a video is a file or a folder of frames.

    Args:
        target: Folder of the targets.
        predictions: Folders of the methods, by the methods' names. Each has a video for every target.
        count: Only the first so many.

    Raises:
        UsageError: A folder has no videos, or lacks one.
    """

    def __init__(self, target: Path, predictions: Mapping[str, Path], count: int | None = None) -> None:
        self._targets = dict(list(_videos(target).items())[:count])
        self.methods: dict[str, Method] = {}
        for method, folder in predictions.items():
            found = _videos(folder)
            if missing := sorted(self._targets.keys() - found.keys()):
                others = sorted(found.keys() - self._targets.keys())
                raise UsageError(
                    f"{folder} has no video called {missing[0]!r} ({len(missing)} of {len(self._targets)} names of "
                    f"{target} are missing{f'; it has {others[0]!r}' if others else ''}); names must be equal"
                )
            self.methods[method] = _reader(found)

    def __len__(self) -> int:
        return len(self._targets)

    def __iter__(self) -> Iterator[Clip]:
        """The clips; a file that cannot be read is a UsageError."""
        for name, source in self._targets.items():
            video, fps = _read(source, name)
            yield Clip(name, "", {"target": video}, fps)


def _videos(folder: Path) -> dict[str, Source]:
    rows = read_folder(folder)
    found = {str(PurePosixPath(row.name).with_suffix("")): row.sources["target"] for row in rows}
    if len(found) < len(rows):
        raise UsageError(f"{folder} holds videos whose names differ in their suffix alone; rename or remove them")
    return found


def _reader(videos: Mapping[str, Source]) -> Method:
    return lambda clip: _read(videos[clip.name], clip.name)[0]


def _read(source: Source, name: str) -> tuple[Tensor, float]:
    """Every frame `(F, 3, H, W)`, on the regular grid of the file's own rate, and that rate."""
    try:
        footage = open_footage(source, name)
        count = max(round(footage.seconds * footage.fps), 1)
        return torch.stack(list(footage.frames_at(_times(count, footage.fps)))), footage.fps
    except BadFile as bad:
        raise UsageError(f"cannot read the video {bad}") from None


def _times(count: int, fps: float) -> Sequence[float]:
    return [frame / fps for frame in range(count)]

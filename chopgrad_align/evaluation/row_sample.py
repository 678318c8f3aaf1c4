"""Knowledge of a table about a video file, as rewards are told it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.footage import Footage, open_footage
from ..data.source import MEDIA_SUFFIXES
from ..objective.reward import Samples


def row_sample(
    row: Mapping[str, Any],
    folder: Path,
    fps: float,
    times: Sequence[float],
    seconds: float,
    sound: tuple[Tensor, int] | None = None,
) -> Samples:
    """Everything that a row says of one video.

    A cell that is a path to a picture or video is read: that of the column `image` as the first image, others as a
    video of that role. Such a video has the frames at the times that are read of the one that is scored, or all of its
    own if it is not as long; a picture is one frame.

    Args:
        row: Cells by column.
        folder: Paths are relative to it.
        fps: Frames a second of the video that is scored.
        times: In seconds: those of its frames that are read.
        seconds: Its length.
        sound: Of its file, and values a second.

    Raises:
        BadFile: A picture or video cannot be read.
    """
    media = {name: folder / cell for name, cell in row.items() if _is_media(cell)}
    videos = {
        name: torch.stack([*_frames(open_footage(path, str(path)), times, seconds, fps)])
        for name, path in media.items()
    }
    image = videos.pop("image", None)
    return Samples(
        count=1,
        fps=[fps],
        images=[None if image is None else image[0]],
        videos={name: [video] for name, video in videos.items()},
        audio=[None if sound is None else sound[0]],
        audio_rate=None if sound is None else sound[1],
        rows=[row],
    )


def _is_media(cell: Any) -> bool:
    return isinstance(cell, str) and Path(cell.strip()).suffix.lower() in MEDIA_SUFFIXES


def _frames(footage: Footage, times: Sequence[float], seconds: float, fps: float) -> Any:
    if footage.seconds == float("inf"):
        return footage.frames_at([0.0])
    if abs(footage.seconds - seconds) <= 0.5 / fps:
        return footage.frames_at(times)
    return footage.frames_at([i / footage.fps for i in range(max(1, round(footage.seconds * footage.fps)))])

"""Masks that are given, as a folder of mask videos."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ...common.errors import UsageError
from ..buckets import resize
from ..footage import Footage, open_footage
from ..source import BadFile
from ..videofolder import read_folder
from .base import chance, integer


@dataclass(frozen=True)
class MaskVideos:
    """A clip of one of the mask videos (or folders of frames) of a folder, bright where something is to be made.

    Its frames are taken as they are, from a random one on; a mask video that is too short runs to and fro. Each is
    stretched to the clip's shape, and mirrored half of the time.
    """

    folder: str
    threshold: float = 0.5

    def draw(self, frames: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`.

        Raises:
            UsageError: A mask video cannot be read.
        """
        try:
            videos = _videos(self.folder)
            video = videos[integer((0, len(videos) - 1), generator)]
            total = max(round(video.seconds * video.fps), 1)
            start = integer((0, max(total - frames, 0)), generator)
            turn = max(2 * (total - 1), 1)
            wanted = [min(n % turn, turn - n % turn) for n in range(start, start + frames)]
            numbers = sorted(set(wanted))
            read = dict(zip(numbers, video.frames_at([n / video.fps for n in numbers]), strict=True))
        except BadFile as bad:
            raise UsageError(f"MaskVideos: bad file {bad} in {self.folder}; remove it") from bad
        grey = torch.stack([read[n].mean(0, keepdim=True) for n in wanted])
        mask = (resize(grey, height, width) > self.threshold).float()
        return mask.flip(3) if chance(0.5, generator) else mask


@cache
def _videos(folder: str) -> list[Footage]:
    return [open_footage(row.sources["target"], row.name) for row in read_folder(folder)]

"""A video file as footage: any container and codec that PyAV's wheels bring.

- *Variable frame rate*: a frame is shown until the next one. Clips ask for times on a regular grid, so that they have a
  fixed rate, whatever the file has.
- *Containers* differ in what they know of their frames' times: see `timeline`.
- *Pixel formats, colours, rotation*: see `video_frame`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import av
import torch
from torch import Tensor

from .source import BadFile, Content, Source, fetch
from .timeline import Timeline, read_timeline
from .video_frame import upright_rgb
from .video_stream import opened


@dataclass(frozen=True)
class VideoFile:
    """An index of a video file, by which clips are cut from it."""

    source: Source
    name: str
    background: float
    height: int
    width: int
    timeline: Timeline

    @staticmethod
    def open(source: Source, name: str, background: float) -> VideoFile:
        """Read as much as must be known to cut clips; see `timeline`.

        Raises:
            BadFile: Unreadable, of an unknown codec, audio only, truncated, HDR, or rotated by no quarter turn.
        """
        content = _content(source)
        timeline, frame, aspect = read_timeline(lambda: opened(content, name, "unreadable"))
        height, width = upright_rgb(frame, aspect, background, name).shape[1:]
        return VideoFile(source, name, background, height, width, timeline)

    @property
    def fps(self) -> float:
        """See `Footage.fps`."""
        return self.timeline.fps

    @property
    def seconds(self) -> float:
        """See `Footage.seconds`."""
        return self.timeline.seconds

    def frames_at(self, times: Sequence[float]) -> Iterator[Tensor]:
        """See `Footage.frames_at`; decodes from a key frame before the first time, or the first one, to the last time.

        A frame is shown from a quarter of an average frame before its time on: time stamps are rounded, and those of
        cameras tremble.
        """
        slack = 0.25 / self.fps
        due = [time + slack for time in times]
        with self._frames(due[0]) as (frames, aspect):
            shown: av.VideoFrame | None = None
            for time, frame in frames:
                if shown is not None:
                    now = [t for t in due if t < time]
                    yield from self._repeat(shown, aspect, len(now))
                    due = due[len(now) :]
                    if not due:
                        return
                shown, since = frame, time
            if shown is None or (since < self.timeline.last - slack and due[-1] > since + 1 / self.fps + slack):
                raise BadFile("corrupt", self.name, f"no frame at {times[-1]:.2f} s; encode it again")
            yield from self._repeat(shown, aspect, len(due))

    @contextmanager
    def _frames(self, time: float) -> Iterator[tuple[Iterator[tuple[float, av.VideoFrame]], Fraction | None]]:
        content, when = _content(self.source), f", after {time:.2f} s"
        with opened(content, self.name, "corrupt", when) as video:
            frames = self.timeline.from_key(video, time)
            if frames is not None:
                yield frames, video.stream.sample_aspect_ratio
                return
        with opened(content, self.name, "corrupt", when) as video:
            yield self.timeline.from_first(video), video.stream.sample_aspect_ratio

    def _repeat(self, frame: av.VideoFrame, aspect: Fraction | None, times: int) -> Iterator[Tensor]:
        if not times:
            return
        if frame.is_corrupt:
            raise BadFile("corrupt", self.name, "a frame is damaged; encode it again")
        pixels = upright_rgb(frame, aspect, self.background, self.name)
        if pixels.shape[1:] != (self.height, self.width):
            raise _resized(pixels, self.name)
        yield from [pixels] * times


def all_frames(source: Source, name: str) -> tuple[Tensor, float]:
    """Every frame of a file, as many as can be decoded: `(F, 3, H, W)` in [0, 1], and its average frames a second.

    Raises:
        BadFile: There are none, or they are not of one size.
    """
    with opened(_content(source), name, "unreadable") as video:
        # Until it is known how many there are they stay as they were decoded: in 4:2:0 an eighth of the memory.
        frames = list(video.decode(video.packets()))
        aspect, rate = video.stream.sample_aspect_ratio, video.rate
        if not frames or not rate:
            raise BadFile("unreadable", name, "no frame can be decoded")
        first = upright_rgb(frames[0], aspect, name=name)
        pixels = torch.empty(len(frames), *first.shape)
        for number, frame in enumerate(frames):
            upright = upright_rgb(frame, aspect, name=name)
            if upright.shape != first.shape:
                raise _resized(upright, name)
            pixels[number] = upright
    return pixels, rate


def _content(source: Source) -> Content:
    content = fetch(source)
    assert not isinstance(content, list)  # a list is pictures: see `open_footage`
    return content


def _resized(pixels: Tensor, name: str) -> BadFile:
    size = "x".join(map(str, pixels.shape[1:]))
    return BadFile("corrupt", name, f"the picture's size becomes {size} midway; encode it again")

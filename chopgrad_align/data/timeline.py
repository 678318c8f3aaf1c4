"""When a video file shows each of its frames, and where decoding may begin to get one of them.

The rule, for every container and codec: the frames of a file are those that its full decode gives, in that order.
Decoding may begin at a later key frame only where that is known to give the same frames; otherwise it begins at the
first. What is known depends on what the container says of its packets:

- *Presentation times and an index of key frames* (MP4, QuickTime, Matroska, WebM): `Stamped`, by the header and the
  packets behind the last key frame.
- *Presentation times without such an index* (MPEG-TS, MPEG-PS, FLV, ASF, …): all packets are read once, and none is
  decoded. Where their times are complete and without jumps, `Stamped`, with the key frames that were found.
- *Else* (raw streams, AVI with B-frames, times that are missing, repeated or begin anew): `Ordered`, by a full decode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, dropwhile, pairwise
from typing import Any, NamedTuple, Protocol

import av

from .source import BadFile
from .video_stream import VideoStream

_INDEXED = ("matroska", "mov")
_LONGEST_STEP = 60.0  # seconds from one frame to the next; more is a jump of the clock
_FIRST_STEP_BACK = 0.25  # seconds; then twice as far each time
_REORDERED_SECONDS = 1.0  # from the packet of a frame to those of frames before it, more than enough
_UNCLEAR_SECONDS = 0.25  # containers round and guess their own length
_FIELD_PACKETS = 1.6  # packets a frame, above which they are taken for the two fields of one


class Timeline(Protocol):
    """The frames of a file in time, in seconds from the first one."""

    @property
    def fps(self) -> float:
        """Frames a second, on average."""

    @property
    def last(self) -> float:
        """Time of the last frame."""

    @property
    def seconds(self) -> float:
        """End of the last frame."""

    def from_key(self, video: VideoStream, time: float) -> Iterator[tuple[float, av.VideoFrame]] | None:
        """Frames with their times from a key frame on that is not after `time`; None if there is no sure one.

        Leaves the file in an unknown place if it returns None.
        """

    def from_first(self, video: VideoStream) -> Iterator[tuple[float, av.VideoFrame]]:
        """All frames with their times; `video` was just opened."""


@dataclass(frozen=True)
class Stamped:
    """Frames that are shown at the presentation times of their packets."""

    fps: float
    last: float
    seconds: float
    start: float
    """Time stamp of the first frame, in seconds."""
    keys: frozenset[tuple[int | None, int]] | None
    """Presentation times and sizes of key packets; None if the container's index of them is trusted."""

    def from_key(self, video: VideoStream, time: float) -> Iterator[tuple[float, av.VideoFrame]] | None:
        """See `Timeline.from_key`; the key frame is the last one, as far as the container finds it."""
        back = 0.0
        while time - back > 0:
            frames = self._landing(video, time, back)
            if frames is not None:
                return self._timed(video, frames)
            # Many containers are searched by decoding time or by bytes, which can end behind the frame.
            back = 2 * back or _FIRST_STEP_BACK
        return None

    def from_first(self, video: VideoStream) -> Iterator[tuple[float, av.VideoFrame]]:
        """See `Timeline.from_first`."""
        return self._timed(video, video.decode(video.packets()))

    def _timed(self, video: VideoStream, frames: Iterator[av.VideoFrame]) -> Iterator[tuple[float, av.VideoFrame]]:
        return ((float(f.pts * video.time_base) - self.start, f) for f in frames if f.pts is not None)

    def _landing(self, video: VideoStream, time: float, back: float) -> Iterator[av.VideoFrame] | None:
        """Frames from the key frame that a seek to `time - back` finds, if it is not after `time`."""
        try:
            video.container.seek(int((self.start + time - back) / video.time_base), stream=video.stream)
        except av.error.FFmpegError:
            return None
        packets = dropwhile(lambda packet: packet.size and not packet.is_keyframe, video.packets())
        key = next(packets, None)
        if key is None or key.pts is None or key.pts * video.time_base > self.start + time:
            return None
        if self.keys is not None and (key.pts, key.size) not in self.keys:
            return None
        # What precedes the key frame in an open group lacks its reference. The key frame itself comes first then, or it
        # was none: the flag of a packet can be wrong, or mark where a gradual refresh begins.
        frames = dropwhile(lambda f: f.pts is None or f.pts < key.pts, video.decode(chain([key], packets)))
        first = next(frames, None)
        if first is None or first.pts != key.pts or not first.key_frame:
            return None
        return chain([first], frames)


@dataclass(frozen=True)
class Ordered:
    """Frames whose times are not known: each is shown as long as any other."""

    fps: float
    count: int

    @property
    def last(self) -> float:
        """See `Timeline.last`."""
        return (self.count - 1) / self.fps

    @property
    def seconds(self) -> float:
        """See `Timeline.seconds`."""
        return self.count / self.fps

    def from_key(self, video: VideoStream, time: float) -> None:
        """See `Timeline.from_key`: how many frames are shown before a key frame, only the decoder knows."""

    def from_first(self, video: VideoStream) -> Iterator[tuple[float, av.VideoFrame]]:
        """See `Timeline.from_first`."""
        return ((number / self.fps, frame) for number, frame in enumerate(video.decode(video.packets())))


def read_timeline(
    reopen: Callable[[], AbstractContextManager[VideoStream]],
) -> tuple[Timeline, av.VideoFrame, Fraction | None]:
    """The timeline of a file, its first frame, and the width of a pixel by its height.

    Args:
        reopen: Opens the file at its beginning.

    Raises:
        BadFile: No frame can be decoded, there is no frame rate, or the file ends before its header says.
    """
    with reopen() as video:
        if _indexed(video):
            first, _ = _decoded(video)
            timeline: Timeline = _stamped(video, first, list(_tail(video)), _indexed_rate(video), None)
            return timeline, first, video.stream.sample_aspect_ratio
        packets = [_Stamp.of(packet) for packet in video.packets() if packet.size]
    with reopen() as video:
        first, rest = _decoded(video)
        if _regular(packets, video):
            keys = frozenset((packet.pts, packet.size) for packet in packets if packet.key)
            timeline = _stamped(video, first, packets, _counted_rate(packets, first, video), keys)
        else:
            timeline = _ordered(video, 1 + sum(1 for _ in rest))
        return timeline, first, video.stream.sample_aspect_ratio


class _Stamp(NamedTuple):
    """A packet without its content."""

    pts: int | None
    dts: int | None
    duration: int
    size: int
    key: bool

    @staticmethod
    def of(packet: Any) -> _Stamp:
        return _Stamp(packet.pts, packet.dts, packet.duration or 0, packet.size, packet.is_keyframe)


def _decoded(video: VideoStream) -> tuple[av.VideoFrame, Iterator[av.VideoFrame]]:
    """The first frame and those after it."""
    frames = video.decode(video.packets())
    first = next(frames, None)
    if first is None:
        raise BadFile("unreadable", video.name, "no frame can be decoded; encode it again")
    return first, frames


def _indexed(video: VideoStream) -> bool:
    """Tell whether the container finds a key frame by its time; it does not where an edit list repeats times."""
    return video.format in _INDEXED and all(a.timestamp < b.timestamp for a, b in pairwise(video.stream.index_entries))


def _tail(video: VideoStream) -> Iterator[_Stamp]:
    """Packets of the end, from a key frame on, but for those that an edit list cuts away."""
    container, stream = video.container, video.stream
    if container.duration is not None:
        # If every frame is called a key frame, the last packet is not that of the last frame.
        back = round(_REORDERED_SECONDS * av.time_base) if stream.codec_context.has_b_frames else 0
        container.seek(max((container.start_time or 0), (container.start_time or 0) + container.duration - back))
    elif stream.start_time is not None:
        container.seek(stream.start_time, stream=stream)
    return (_Stamp.of(packet) for packet in video.packets() if packet.size and not packet.is_discard)


def _regular(packets: Sequence[_Stamp], video: VideoStream) -> bool:
    """Tell whether packets are complete in their times, without jumps, so that a time means one frame."""
    if not video.has_presentation_times and video.stream.codec_context.has_b_frames:
        return False
    shown = sorted(packet.pts for packet in packets if packet.pts is not None)
    decoded = [packet.dts for packet in packets if packet.dts is not None]
    longest = _LONGEST_STEP / video.time_base if video.clock_may_jump else math.inf
    return len(shown) == len(packets) > 0 and all(
        0 < b - a < longest for a, b in chain(pairwise(shown), pairwise(decoded))
    )


def _indexed_rate(video: VideoStream) -> float | None:
    """Frames a second between the first and the last: how long the last is shown says nothing of the others."""
    entries = video.stream.index_entries
    if len(entries) == video.stream.frames > 1 and (span := entries[-1].timestamp - entries[0].timestamp) > 0:
        return (len(entries) - 1) / float(span * video.time_base)
    return video.rate


def _counted_rate(packets: Sequence[_Stamp], first: av.VideoFrame, video: VideoStream) -> float | None:
    # A recording can begin with packets that cannot be decoded, and with gaps between them.
    begin = -math.inf if first.pts is None else first.pts
    times = [packet.pts for packet in packets if packet.pts is not None and packet.pts >= begin]
    if len(times) < 2:
        return video.rate
    counted = (len(times) - 1) / float((max(times) - min(times)) * video.time_base)
    return video.rate if video.rate and counted > _FIELD_PACKETS * video.rate else counted


def _stamped(
    video: VideoStream,
    first: av.VideoFrame,
    packets: Sequence[_Stamp],
    rate: float | None,
    keys: frozenset[tuple[int | None, int]] | None,
) -> Stamped:
    ends = [(packet.pts, packet.duration) for packet in packets if packet.pts is not None]
    last, duration = (float(ticks * video.time_base) for ticks in max(ends, default=(0, 0)))
    end = last + (duration or 1 / (rate or math.inf)) if ends else None
    _check_claim(video, end)
    start = math.inf if first.pts is None else float(first.pts * video.time_base)
    if not rate or end is None or end <= start:
        raise _timeless(video)
    return Stamped(rate if last > start else 1 / (end - start), last - start, end - start, start, keys)


def _ordered(video: VideoStream, count: int) -> Ordered:
    if not video.rate:
        raise _timeless(video)
    _check_claim(video, count / video.rate)
    return Ordered(video.rate, count)


def _timeless(video: VideoStream) -> BadFile:
    return BadFile("unreadable", video.name, "it has no frame rate or no time stamps; encode it again")


def _check_claim(video: VideoStream, end: float | None) -> None:
    claimed = _claimed_end(video)
    if claimed is not None and (end is None or end < claimed - _UNCLEAR_SECONDS):
        ends = "before its last key frame" if end is None else f"after {end:.1f} s"
        raise BadFile("truncated", video.name, f"it ends {ends} of {claimed:.1f} s; copy or download it again")


def _claimed_end(video: VideoStream) -> float | None:
    """The end of the video, in seconds, by its header, if that says so."""
    container, stream = video.container, video.stream
    if video.format not in (*_INDEXED, "avi", "flv"):  # FFmpeg guesses, by time stamps or by the bit rate
        return None
    if stream.duration is not None:
        return float(((stream.start_time or 0) + stream.duration) * video.time_base)
    if "DURATION" in stream.metadata:  # Matroska: hours:minutes:seconds
        duration = stream.metadata["DURATION"]
        try:
            hours, minutes, seconds = duration.split(":")
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        except ValueError:
            said = f"its header gives its length as {duration!r}; encode it again"
            raise BadFile("unreadable", video.name, said) from None
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / av.time_base
    return None

"""An opened video file: its packets and its frames, in the order and with the time stamps that FFmpeg gives them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
from av.container import InputContainer
from av.container.core import Flags as ContainerFlags
from av.format import Flags as FormatFlags
from av.stream import Disposition

from .source import BadFile, Content

_MISSING_TIMES_ARE_MADE_UP: Any = ContainerFlags.gen_pts  # PyAV's default
# VP8 and VP9 hide alpha in a second stream that only these decoders read.
_LIBVPX = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


@dataclass(frozen=True)
class VideoStream:
    """The video of an open file."""

    container: InputContainer
    stream: av.VideoStream
    name: str

    @property
    def format(self) -> str:
        """FFmpeg's name of the container, the first of several that it reads alike."""
        return self.container.format.name.split(",")[0]

    @property
    def has_presentation_times(self) -> bool:
        """True if packets say when they are shown, and not only when they are decoded, or nothing at all."""
        return self.format != "avi" and not self._is(FormatFlags.no_timestamps)

    @property
    def clock_may_jump(self) -> bool:
        """True if time stamps may begin anew at any place, as where one broadcast follows another."""
        return self._is(FormatFlags.ts_discont)

    @property
    def time_base(self) -> Fraction:
        """Seconds a tick of time stamps."""
        return self.stream.time_base or Fraction(1, av.time_base)

    @property
    def rate(self) -> float | None:
        """Frames a second by the header and the first packets; None if they do not tell."""
        rate = self.stream.average_rate or self.stream.guessed_rate
        return float(rate) if rate else None

    def _is(self, flag: Any) -> bool:
        return bool(self.container.format.flags & flag.value)

    def packets(self) -> Iterator[Any]:
        """Packets from where the file stands; the last, without content, asks the decoder for what it still holds."""
        for packet in self.container.demux(self.stream):
            if not self.has_presentation_times:
                packet.pts = packet.dts  # what FFmpeg has there is its guess, and another one after a seek
            yield packet

    def decode(self, packets: Iterable[Any]) -> Iterator[av.VideoFrame]:
        """Frames of packets, in the order in which they are shown."""
        decoder: Any = self.stream.codec_context
        if self.stream.metadata.get("alpha_mode") == "1" and decoder.name in _LIBVPX:
            decoder = av.CodecContext.create(_LIBVPX[decoder.name], "r")
        for packet in packets:
            yield from decoder.decode(packet if packet.size else None)


@contextmanager
def opened(content: Content, name: str, kind: str, when: str = "") -> Iterator[VideoStream]:
    """Open a file; what is raised in the block for a broken one is a `BadFile` of this kind."""
    file = io.BytesIO(content) if isinstance(content, bytes) else str(content)
    try:
        if not (content if isinstance(content, bytes) else os.path.getsize(content)):
            raise BadFile("unreadable", name, "the file is empty; copy or download it again")
        # A title in another encoding than UTF-8 says nothing of the pixels.
        with av.open(file, "r", metadata_errors="replace") as container:
            container.flags &= ~_MISSING_TIMES_ARE_MADE_UP.value
            yield VideoStream(container, _stream(container, name), name)
    except (OSError, av.error.FFmpegError) as error:
        raise BadFile(kind, name, f"{error.strerror or error}{when}; copy or encode it again") from None
    except (ValueError, ArithmeticError) as error:  # sizes, rates and times of a broken header: Python's own complaints
        raise BadFile(kind, name, f"{error}{when}; encode it again") from None


def _stream(container: InputContainer, name: str) -> av.VideoStream:
    # An audio file's cover picture is a video stream too.
    found = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not found:
        raise BadFile("audio only" if container.streams.audio else "unreadable", name, "it holds no video")
    if found[0].codec_context is None:
        raise BadFile("codec", name, "its codec is unknown to this build of FFmpeg; encode it as h264")
    return found[0]

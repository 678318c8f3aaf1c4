"""A video file as footage: any container and codec that PyAV's wheels bring, read by time stamps.

What becomes of the unusual:

- *Variable frame rate*: a frame is shown until the next one's time stamp. Clips ask for times on a regular grid, so
  that they have a fixed rate, whatever the file has.
- *Rotated or mirrored* (a phone's display matrix): turned upright. *Pixels that are not square*: widened.
- *10 bit and more*: converted to float at full depth. High dynamic range (PQ and HLG) is refused: without tone mapping
  its pixels do not mean what those of other files mean.
- *Alpha*: taken as straight (not premultiplied) and laid over a background. VP8 and VP9 hide it in a second stream that
  only the libvpx decoders read.
- *Untagged colours*: BT.709 above standard definition and BT.601 below, the guess of most players.
- *Chroma* is interpolated, not repeated.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, ColorTrc
from torch import Tensor

from .source import BadFile, Source, fetch
from .stills import over

_UNSPECIFIED = 2  # ITU-T H.273
_HDR = {int(ColorTrc.SMPTE2084): "PQ", int(ColorTrc.ARIB_STD_B67): "HLG"}
_LIBVPX = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_UNCLEAR_SECONDS = 0.25  # containers round and guess their own length


@dataclass(frozen=True)
class VideoFile:
    """An index of a video file, by which clips are cut from it."""

    source: Source
    name: str
    background: float
    height: int
    width: int
    fps: float
    seconds: float
    start: float
    """Time stamp of the first frame, in seconds."""

    @staticmethod
    def open(source: Source, name: str, background: float) -> VideoFile:
        """Read the header, the first frame, and the packets behind the last key frame: enough to know the length.

        Raises:
            BadFile: Unreadable, of an unknown codec, audio only, truncated, HDR, or rotated by no quarter turn.
        """
        with _opened(source, name, "unreadable") as (container, stream):
            start, frame = next(_decode(container, stream), (0.0, None))
            if frame is None:
                raise BadFile("unreadable", name, "no frame can be decoded; encode it again")
            height, width = upright_rgb(frame, stream.sample_aspect_ratio, background, name).shape[1:]
            claimed = _claimed_end(container, stream, name)
            end = _end(container, stream)
            if claimed is not None and (end is None or end < claimed - _UNCLEAR_SECONDS):
                ends = "before its last key frame" if end is None else f"after {end:.1f} s"
                raise BadFile("truncated", name, f"it ends {ends} of {claimed:.1f} s; copy or download it again")
            rate = stream.average_rate or stream.guessed_rate
            if not rate or end is None or end <= start:
                raise BadFile("unreadable", name, "it has no frame rate or no time stamps; encode it again")
            return VideoFile(source, name, background, height, width, float(rate), end - start, start)

    def frames_at(self, times: Sequence[float]) -> Iterator[Tensor]:
        """See `Footage.frames_at`; decodes from the key frame before the first time to the last time."""
        # A quarter of a frame of slack: time stamps are rounded, to whole milliseconds in Matroska.
        slack = 0.25 / self.fps
        due = [self.start + time + slack for time in times]
        with _opened(self.source, self.name, "corrupt", f", after {times[0]:.2f} s") as (container, stream):
            shown: av.VideoFrame | None = None
            for time, frame in _decode_from(container, stream, due[0], self.start):
                if shown is not None:
                    now = [t for t in due if t < time]
                    yield from self._repeat(shown, stream, len(now))
                    due = due[len(now) :]
                    if not due:
                        return
                shown, shown_until = frame, time + (frame.duration or math.inf) * _time_base(stream)
            if shown is None or due[-1] > shown_until + slack:
                raise BadFile("corrupt", self.name, f"no frame at {times[-1]:.2f} s; encode it again")
            yield from self._repeat(shown, stream, len(due))

    def _repeat(self, frame: av.VideoFrame, stream: av.VideoStream, times: int) -> Iterator[Tensor]:
        if not times:
            return
        if frame.is_corrupt:
            raise BadFile("corrupt", self.name, "a frame is damaged; encode it again")
        pixels = upright_rgb(frame, stream.sample_aspect_ratio, self.background, self.name)
        if pixels.shape[1:] != (self.height, self.width):
            raise _resized(pixels, self.name)
        yield from [pixels] * times


def all_frames(source: Source, name: str) -> tuple[Tensor, float]:
    """Every frame of a file, as many as can be decoded: `(F, 3, H, W)` in [0, 1], and its average frames a second.

    Raises:
        BadFile: There are none, or they are not of one size.
    """
    with _opened(source, name, "unreadable") as (container, stream):
        # Until it is known how many there are they stay as they were decoded: in 4:2:0 an eighth of the memory.
        frames = [frame for _, frame in _decode(container, stream)]
        aspect, rate = stream.sample_aspect_ratio, stream.average_rate or stream.guessed_rate
        if not frames or not rate:
            raise BadFile("unreadable", name, "no frame can be decoded")
        first = upright_rgb(frames[0], aspect, name=name)
        video = torch.empty(len(frames), *first.shape)
        for number, frame in enumerate(frames):
            pixels = upright_rgb(frame, aspect, name=name)
            if pixels.shape != first.shape:
                raise _resized(pixels, name)
            video[number] = pixels
    return video, float(rate)


def _resized(pixels: Tensor, name: str) -> BadFile:
    size = "x".join(map(str, pixels.shape[1:]))
    return BadFile("corrupt", name, f"the picture's size becomes {size} midway; encode it again")


def upright_rgb(
    frame: av.VideoFrame, aspect: Fraction | None = None, background: float = 0.0, name: str = "video"
) -> Tensor:
    """A decoded frame as it is meant to be seen: float32 `(3, H, W)` in [0, 1].

    Args:
        frame: Of any pixel format.
        aspect: Width of a pixel by its height; None: 1.
        background: Grey level behind transparent pixels.
        name: What messages call the file.

    Raises:
        BadFile: It has high dynamic range, or is rotated by what is not a quarter turn.
    """
    if frame.color_trc in _HDR:
        raise BadFile("HDR", name, f"high dynamic range ({_HDR[frame.color_trc]}); tone-map it to BT.709 first")
    untagged = frame.colorspace == _UNSPECIFIED and not frame.format.is_rgb
    high_definition = frame.width >= 1280 or frame.height > 576
    alpha = any(component.is_alpha for component in frame.format.components)
    # Planes of 16 bits: the conversion of libswscale that interpolates chroma and keeps all bits. (Its planes of floats
    # do so as well, but read uninitialised memory where the width is not a multiple of 4.)
    planes = frame.reformat(
        width=round(frame.width * (aspect or 1)),
        format="gbrap16le" if alpha else "gbrp16le",
        src_colorspace=Colorspace.ITU709 if untagged and high_definition else None,
    ).to_ndarray()
    # It shifts values to 16 bits and leaves the low ones empty, so that white comes out a little too dark.
    bits = min(frame.format.components[0].bits, 16)
    full_range = frame.format.is_rgb or frame.color_range == ColorRange.JPEG
    white = (2**bits - 1) << (16 - bits) if full_range else 255 << 8
    pixels = (torch.from_numpy(planes.astype(np.float32)).permute(2, 0, 1) / white).clamp(0, 1)
    return _upright(over(pixels, background) if alpha else pixels, frame, name).contiguous()


def _upright(pixels: Tensor, frame: av.VideoFrame, name: str) -> Tensor:
    """Apply the display matrix: a pixel (x, y) is shown at (a x + c y, b x + d y)."""
    side_data = frame.side_data.get(SideData.DISPLAYMATRIX)  # type: ignore[call-overload]
    if side_data is None:
        return pixels
    a, b, _, c, d, *_ = (np.frombuffer(bytes(side_data), np.int32) / 65536).tolist()
    if abs(a) == abs(d) == 1 and b == c == 0:
        flips = [axis for axis, sign in ((2, a), (1, d)) if sign < 0]
    elif abs(b) == abs(c) == 1 and a == d == 0:
        pixels = pixels.transpose(1, 2)
        flips = [axis for axis, sign in ((2, c), (1, b)) if sign < 0]
    else:
        raise BadFile("rotated", name, f"by the matrix [{a:g} {b:g}; {c:g} {d:g}], not a quarter turn; encode it again")
    return pixels.flip(flips)


@contextmanager
def _opened(source: Source, name: str, kind: str, when: str = "") -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """A file and the video in it; what is raised in the block for a broken file is a `BadFile` of this kind."""
    try:
        # A title in another encoding than UTF-8 says nothing of the pixels.
        with av.open(_file(source), "r", metadata_errors="replace") as container:
            yield container, _stream(container, name)
    except (OSError, av.error.FFmpegError) as error:
        raise BadFile(kind, name, f"{error.strerror or error}{when}") from None
    except (ValueError, ArithmeticError) as error:  # sizes, rates and times of a broken header: Python's own complaints
        raise BadFile(kind, name, f"{error}{when}") from None


def _file(source: Source) -> str | io.BytesIO:
    content = fetch(source)
    return io.BytesIO(content) if isinstance(content, bytes) else str(content)


def _stream(container: InputContainer, name: str) -> av.VideoStream:
    # An audio file's cover picture is a video stream too.
    found = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not found:
        raise BadFile("audio only" if container.streams.audio else "unreadable", name, "it holds no video")
    if found[0].codec_context is None:
        raise BadFile("codec", name, "its codec is unknown to this build of FFmpeg; encode it as h264")
    return found[0]


def _time_base(stream: av.VideoStream) -> Fraction:
    return stream.time_base or Fraction(1, av.time_base)


def _decode(container: InputContainer, stream: av.VideoStream) -> Iterator[tuple[float, av.VideoFrame]]:
    """Frames from where the container stands, with the times (in seconds) from which they are shown."""
    decoder: Any = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in _LIBVPX:
        decoder = av.CodecContext.create(_LIBVPX[decoder.name], "r")
    for packet in container.demux(stream):
        for frame in decoder.decode(packet if packet.size else None):
            if frame.pts is not None:
                yield float(frame.pts * _time_base(stream)), frame


def _decode_from(
    container: InputContainer, stream: av.VideoStream, time: float, start: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Decode as `_decode` does, from a frame that is not after `time`, or the very first."""
    back = 0.0
    while True:
        target = max(time - back, start)
        container.seek(int(target / _time_base(stream)), stream=stream)
        frames = _decode(container, stream)
        first = next(frames, None)
        # With B-frames or a coarse index a seek can land behind the frame that was asked for.
        if target == start or (first is not None and first[0] <= time):
            break
        back = 2 * back or 1.0
    if first is not None:
        yield first
    yield from frames


def _end(container: InputContainer, stream: av.VideoStream) -> float | None:
    """The end of the last frame, in seconds, by the packets from the last key frame on; None if there are none."""
    if container.duration is not None:
        container.seek((container.start_time or 0) + container.duration)
    elif stream.start_time is not None:
        container.seek(stream.start_time, stream=stream)
    ends = [p.pts + (p.duration or 0) for p in container.demux(stream) if p.pts is not None]
    return float(max(ends) * _time_base(stream)) if ends else None


def _claimed_end(container: InputContainer, stream: av.VideoStream, name: str) -> float | None:
    """The end of the video, in seconds, by its header, if that says so."""
    if stream.duration is not None:
        return float(((stream.start_time or 0) + stream.duration) * _time_base(stream))
    if "DURATION" in stream.metadata:  # Matroska: hours:minutes:seconds
        duration = stream.metadata["DURATION"]
        try:
            hours, minutes, seconds = duration.split(":")
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        except ValueError:
            raise BadFile("unreadable", name, f"its header gives its length as {duration!r}; encode it again") from None
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / av.time_base
    return None

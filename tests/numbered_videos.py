"""Videos whose frames carry their number as a bar code, in the containers and codecs that PyAV can write.

`MATRIX` has what makes frames hard to find: B-frames, open groups, edit lists, clocks that start late, jump, wrap round
or are not there.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange

SIZE, RATE = 64, 25
TICK = Fraction(1, 5 * RATE)  # in which `Case.stamps` are
_BITS = 8


def bar_code(number: int) -> np.ndarray:
    """Eight columns, white where the number's bit is set, and their negative below, under noise: `(64, 64, 3)`."""
    bits = np.array([number >> bit & 1 for bit in range(_BITS)])
    halves = np.stack([bits, 1 - bits]) * 180 + 35
    image = halves.repeat(SIZE // 2, 0).repeat(SIZE // _BITS, 1)[..., None].repeat(3, 2)
    return (image + np.random.default_rng(number).integers(-14, 15, image.shape)).astype(np.uint8)


def numbers(video: torch.Tensor) -> list[int]:
    """Numbers of frames `(F, 3, 64, 64)`; -1 for one that is damaged."""
    blocks = video.mean(1).unfold(1, SIZE // 2, SIZE // 2).unfold(2, SIZE // _BITS, SIZE // _BITS).mean((3, 4))
    upper, lower = blocks[:, 0] > 0.5, blocks[:, 1] > 0.5
    whole = ((blocks - 0.5).abs() > 0.2).all(2).all(1) & (upper != lower).all(1)
    return torch.where(whole, (upper * 2 ** torch.arange(_BITS)).sum(1), -1).tolist()


# --- codecs -----------------------------------------------------------------------------------------------------------


def _x264(gop: int, b: int, open_gop: bool) -> dict[str, str]:
    detail = f"keyint={gop}:min-keyint={gop}:scenecut=0:b-adapt=0:bframes={b}:open-gop={int(open_gop)}"
    return {"preset": "veryfast", "crf": "18", "x264-params": detail}


def _refreshed(gop: int, b: int, open_gop: bool) -> dict[str, str]:
    return {"preset": "veryfast", "crf": "18", "x264-params": f"keyint={gop}:intra-refresh=1:bframes=0:scenecut=0"}


def _x265(gop: int, b: int, open_gop: bool) -> dict[str, str]:
    detail = f"log-level=none:keyint={gop}:min-keyint={gop}:scenecut=0:b-adapt=0:bframes={b}:open-gop={int(open_gop)}"
    return {"preset": "ultrafast", "crf": "16", "x265-params": f"{detail}:pools=1:frame-threads=1"}


def _mpeg(gop: int, b: int, open_gop: bool) -> dict[str, str]:
    closed = {} if open_gop else {"flags": "+cgop"}
    return {"g": str(gop), "bf": str(b), "qmin": "1", "qmax": "6", "sc_threshold": "1000000000", **closed}


def _vpx(gop: int, b: int, open_gop: bool) -> dict[str, str]:
    hidden = {"auto-alt-ref": str(min(b, 1)), "lag-in-frames": str(4 * b)}  # frames that are only referred to
    return {"g": str(gop), "crf": "12", "b": "1M", "deadline": "realtime", "cpu-used": "8", **hidden}


def _av1(gop: int, b: int, open_gop: bool) -> dict[str, str]:
    return {"g": str(gop), "preset": "11", "crf": "20", "svtav1-params": f"lp=1:pred-struct={2 if b else 1}"}


def _simple(gop: int, b: int, open_gop: bool) -> dict[str, str]:
    return {"g": str(gop), "qmin": "1", "qmax": "6"}


def _none(gop: int, b: int, open_gop: bool) -> dict[str, str]:
    return {}


# Encoder, pixel format, and the options for key frames, B-frames and open groups.
CODECS: dict[str, tuple[str, str, Callable[[int, int, bool], dict[str, str]]]] = {
    "h264": ("libx264", "yuv420p", _x264),
    "refreshed": ("libx264", "yuv420p", _refreshed),
    "hevc": ("libx265", "yuv420p", _x265),
    "mpeg4": ("mpeg4", "yuv420p", _mpeg),
    "mpeg2": ("mpeg2video", "yuv420p", _mpeg),
    "mpeg1": ("mpeg1video", "yuv420p", _mpeg),
    "vp8": ("libvpx", "yuv420p", _vpx),
    "vp9": ("libvpx-vp9", "yuv420p", _vpx),
    "alpha": ("libvpx-vp9", "yuva420p", _vpx),
    "av1": ("libsvtav1", "yuv420p", _av1),
    "wmv2": ("wmv2", "yuv420p", _simple),
    "msmpeg4": ("msmpeg4", "yuv420p", _simple),
    "flv1": ("flv", "yuv420p", _simple),
    "rv20": ("rv20", "yuv420p", _simple),
    "mjpeg": ("mjpeg", "yuvj420p", _simple),
    "ffv1": ("ffv1", "yuv444p", _none),
    "prores": ("prores_ks", "yuv422p10le", _none),
    "huffyuv": ("huffyuv", "yuv422p", _none),
    "raw": ("rawvideo", "yuv420p", _none),
    "png": ("png", "rgb24", _none),
    "gif": ("gif", "rgb8", _none),
    "apng": ("apng", "rgb24", _none),
}


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A file of the matrix: the frames 0, 1, … of a container and codec, and what is unusual about them."""

    suffix: str
    codec: str
    label: str = ""
    gop: int = 10
    b: int = 0
    open_gop: bool = False
    frames: int = 40
    stamps: tuple[int, ...] | None = None
    """Time of each frame in ticks; None: at a constant rate."""
    container: tuple[tuple[str, str], ...] = ()
    """Options of the muxer."""
    setup: Callable[[Any], None] | None = None
    """What is set at the stream."""
    remux: Callable[[list[Any]], list[Any]] | None = None
    """What becomes of the packets on their way into the file."""
    patch: Callable[[bytes], bytes] | None = None
    """What becomes of the file."""
    audio: bool = False
    """Silence goes with it, for longer than the video."""

    @property
    def id(self) -> str:
        parts = [self.suffix, self.codec, f"b{self.b}" if self.b else "", "open" if self.open_gop else "", self.label]
        return "-".join(filter(None, parts))

    def write(self, folder: Path) -> Path:
        """Encode the file into a folder."""
        path = folder / f"{self.id}.{self.suffix}"
        encoder, pixels, options = CODECS[self.codec]
        # FFmpeg's default for this suffix is an MP4.
        with av.open(str(path), "w", "m4v" if self.suffix == "m4v" else None, options=dict(self.container)) as output:
            stream = output.add_stream(encoder, rate=RATE, options=options(self.gop, self.b, self.open_gop))
            stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, pixels
            if self.stamps:
                stream.codec_context.time_base = TICK
            if self.setup:
                self.setup(stream)
            sound = (
                output.add_stream("mp2" if self.suffix in ("ts", "mpg") else "aac", rate=48000) if self.audio else None
            )
            packets = [
                packet for frame in [*map(self._frame, range(self.frames)), None] for packet in stream.encode(frame)
            ]
            packets = self.remux(packets) if self.remux else packets
            packets += _silence(sound, self.frames / RATE + 1) if sound else []
            for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
                output.mux(packet)
        if self.patch:
            path.write_bytes(self.patch(path.read_bytes()))
        return path

    def _frame(self, number: int) -> Any:
        pixels = CODECS[self.codec][1]
        frame = av.VideoFrame.from_ndarray(bar_code(number), format="rgb24")
        if pixels.startswith("yuv"):
            studio = ColorRange.JPEG if pixels.startswith("yuvj") else ColorRange.MPEG
            frame = frame.reformat(format=pixels, dst_color_range=studio)
        if self.stamps:
            frame.pts, frame.time_base = self.stamps[number], TICK
        return frame


def _silence(stream: Any, seconds: float) -> list[Any]:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, int(48000 * seconds)), np.int16), format="s16", layout="mono")
    frame.rate, frame.pts = 48000, 0
    return [*stream.encode(frame), *stream.encode()]


def _shifted(frames: float) -> Callable[[list[Any]], list[Any]]:
    def remux(packets: list[Any]) -> list[Any]:
        for packet in packets:
            ticks = round(frames / RATE / packet.time_base)
            packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
        return packets

    return remux


def _disordered(second: int, first: int | None = None) -> Callable[[list[Any]], list[Any]]:
    """Give a packet the presentation time of another one; both, if there is a second."""

    def remux(packets: list[Any]) -> list[Any]:
        for packet in packets:
            packet.pts += round(4 / RATE / packet.time_base)  # muxers want them after the decoding times
        a, b = packets[second], packets[second + 1]
        a.pts, b.pts = (b.pts, a.pts) if first is None else (a.pts, a.pts)
        return packets

    return remux


def _headless(packets: list[Any]) -> list[Any]:
    return packets[5:]


def _twice(data: bytes) -> bytes:
    return 2 * data


def _all_keys(data: bytes) -> bytes:
    """Without its list of key frames, every frame of an MP4 is called one."""
    assert data.count(b"stss") == 1
    return data.replace(b"stss", b"free")


def _two_edits(data: bytes) -> bytes:
    """Frames 5 to 14 and 21 to 35, by an edit list in the place of one that also has two entries."""
    place = data.index(b"elst") + 4
    assert data[place : place + 8] == struct.pack(">II", 0, 2)
    reorder = 2  # frames between decoding and presentation
    edits = [(400, (reorder + 5) * 512), (600, (reorder + 21) * 512)]
    entries = b"".join(struct.pack(">IiI", milliseconds, ticks, 1 << 16) for milliseconds, ticks in edits)
    return data[: place + 8] + entries + data[place + 8 + len(entries) :]


# --- the matrix -------------------------------------------------------------------------------------------------------

_REORDERED = {
    "h264": ["mp4", "mov", "3gp", "mkv", "ts", "avi", "flv", "nut", "mpg", "h264"],
    "hevc": ["mp4", "mkv", "ts", "hevc"],
    "mpeg4": ["mp4", "mkv", "avi", "m4v", "ts"],
    "mpeg2": ["mp4", "mkv", "avi", "ts", "mpg", "vob", "m2v", "mxf"],
    "mpeg1": ["mpg", "m1v"],
}
_HIDDEN = {"vp8": ["mkv", "webm"], "vp9": ["webm", "mp4", "ivf"], "av1": ["webm", "mp4", "ivf", "obu"]}
_INTRA_OR_SIMPLE = {
    "ffv1": ["mkv", "avi"],
    "mjpeg": ["mov", "avi", "mjpeg"],
    "raw": ["y4m", "avi"],
    "prores": ["mov"],
    "png": ["mov"],
    "huffyuv": ["avi"],
    "wmv2": ["wmv"],
    "msmpeg4": ["avi"],
    "flv1": ["flv"],
    "rv20": ["rm"],
    "gif": ["gif"],
    "apng": ["apng"],
    "alpha": ["webm"],
    "refreshed": ["mp4", "mkv", "ts"],
}
_FRAGMENTED = (("movflags", "frag_keyframe+empty_moov"),)
_NEGATIVE = (("avoid_negative_ts", "disabled"),)
_VARIABLE = tuple(np.cumsum([0, *([5, 1, 22, 3, 2, 11] * 7)])[:40].tolist())
_GAPS = tuple(5 * (number + number // 7) for number in range(40))
_ANY = [
    ("mp4", "h264"),
    ("mov", "mpeg4"),
    ("mkv", "h264"),
    ("ts", "h264"),
    ("flv", "h264"),
    ("nut", "h264"),
    ("mpg", "mpeg2"),
]
_WRAP = (2**33 / 90000 - 0.8) * RATE  # frames till 0.8 seconds before the 33 bits of MPEG's clock are full

MATRIX = [
    *(
        Case(s, c, b=b, open_gop=o)
        for c, t in _REORDERED.items()
        for s in t
        for b, o in ((0, False), (2, False), (2, True))
    ),
    *(Case(s, c, b=b) for c, suffixes in _HIDDEN.items() for s in suffixes for b in (0, 2)),
    *(Case(s, c) for c, suffixes in _INTRA_OR_SIMPLE.items() for s in suffixes),
    *(Case("mp4", "h264", "fragmented", b=b, open_gop=b > 0, container=_FRAGMENTED) for b in (0, 2)),
    *(Case(s, c, "one-group", b=2, gop=100, frames=80) for s, c in _ANY),
    *(Case(s, c, "late", b=2, remux=_shifted(30)) for s, c in _ANY),
    *(Case(s, c, "variable", b=2, stamps=_VARIABLE) for s, c in _ANY[:-1]),
    *(Case(s, c, "audio", b=2, audio=True) for s, c in _ANY if s != "nut"),
    *(
        Case(s, c, "headless", b=2, gop=12, open_gop=o, remux=_headless)
        for s, c in _ANY
        if c != "mpeg4"
        for o in (False, True)
    ),
    *(Case(s, c, "swapped", b=2, remux=_disordered(12)) for s, c in _ANY),
    *(Case(s, c, "repeated", b=2, remux=_disordered(12, 13)) for s, c in _ANY),
    *(
        Case(s, "h264", "cut", b=2, open_gop=o, remux=_shifted(-13), container=_NEGATIVE)
        for s in ("mp4", "mov")
        for o in (False, True)
    ),
    *(
        Case(s, "h264", "edits", b=2, open_gop=o, remux=_shifted(5), patch=_two_edits)
        for s in ("mp4", "mov")
        for o in (False, True)
    ),
    *(Case(s, "h264", "all-keys", b=2, patch=_all_keys) for s in ("mp4", "mov")),
    *(Case("mp4", c, "all-keys", b=2, patch=_all_keys) for c in ("hevc", "mpeg4", "vp9")),
    *(Case("mov", "h264", "turned", b=2, setup=lambda stream: stream.set_display_rotation(180)) for _ in (0,)),
    *(Case("avi", c, "gaps", b=b, stamps=_GAPS) for c, b in (("mpeg4", 0),)),
    *(Case("ts", c, "wraps", b=2, remux=_shifted(_WRAP)) for c in ("h264", "mpeg2")),
    *(
        Case(s, c, "twice", b=2, patch=_twice)
        for s, c in (("ts", "h264"), ("ts", "mpeg2"), ("mpg", "mpeg2"), ("h264", "h264"))
    ),
]

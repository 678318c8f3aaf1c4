"""Frames that are asked for are those of the full decode, in every container."""

import itertools
import os

import av
import numpy as np
import pytest
import torch
from numbered_videos import MATRIX, RATE, numbers
from PIL import Image

from chopgrad_align.common.errors import UsageError
from chopgrad_align.data.buckets import Bucket
from chopgrad_align.data.clips import Clips
from chopgrad_align.data.footage import open_footage
from chopgrad_align.data.source import BadFile, Row
from chopgrad_align.data.stills import Still
from chopgrad_align.data.timeline import Ordered, Stamped
from chopgrad_align.data.video import read_video
from chopgrad_align.data.video_frame import upright_rgb
from chopgrad_align.data.video_stream import VideoStream

os.environ.setdefault("SVT_LOG", "1")  # errors only

CASES = {case.id: case for case in MATRIX}
# One of each kind of clock and of each way to a key frame.
FAST = {
    "avi-h264-b2",
    "avi-mpeg4-b2-open",
    "avi-mpeg4-gaps",
    "flv-h264-b2-audio",
    "h264-h264-b2",
    "mkv-h264-b2-variable",
    "mkv-hevc-b2-open",
    "mp4-h264-b2-all-keys",
    "mp4-h264-b2-open-cut",
    "mp4-h264-b2-open-edits",
    "mpg-h264-b2-open",
    "mpg-mpeg2-b2-open",
    "ts-h264-b2-one-group",
    "ts-h264-b2-open-headless",
    "ts-h264-b2-twice",
    "ts-h264-b2-wraps",
    "ts-mpeg2-b2-open",
    "ts-refreshed",
    "webm-vp9-b2",
    "wmv-wmv2",
}


def every_frame(path):
    """Frames and their time stamps, by decoding the whole file."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoder = stream.codec_context
        if stream.metadata.get("alpha_mode") == "1":
            decoder = av.CodecContext.create("libvpx-vp9", "r")
        frames = [f for packet in container.demux(stream) for f in decoder.decode(packet if packet.size else None)]
        video = torch.stack([upright_rgb(frame, stream.sample_aspect_ratio) for frame in frames])
        return video, [frame.pts and float(frame.pts * stream.time_base) for frame in frames]


def times_of(case, stamps):
    """The times from which the frames are shown; a frame is not shown before the one before it."""
    jumps = case.label in ("twice", "edits") or (case.label == "repeated" and case.suffix in ("ts", "flv", "nut"))
    if jumps or (case.suffix in ("mpg", "vob", "avi", "h264", "hevc", "m1v", "m2v") and not case.stamps):
        return [number / RATE for number in range(len(stamps))]
    return [latest - stamps[0] for latest in itertools.accumulate(stamps, max)]


def test_the_fast_cases_are_in_the_matrix():
    assert CASES.keys() >= FAST
    assert len(CASES) == len(MATRIX)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_clips_have_the_frames_of_the_full_decode(tmp_path, name):
    case = CASES[name]
    path = case.write(tmp_path)
    video, stamps = every_frame(path)
    times = times_of(case, stamps)
    footage = open_footage(path, name)
    if case.stamps is None:
        assert footage.fps == pytest.approx(RATE, abs=0.01)
        assert round(footage.seconds * footage.fps) == len(video)
    else:
        assert times[-1] < footage.seconds < times[-1] + 0.25
    slack = 0.25 / footage.fps + 1e-9
    for start in [*range(0, len(times) - 3, 3), len(times) - 3]:
        asked = times[start : start + 3]
        shown = [max(n for n, time in enumerate(times) if time <= t + slack) for t in asked]
        clip = torch.stack(list(footage.frames_at(asked)))
        assert torch.equal(clip, video[shown]), (start, numbers(clip), numbers(video[shown]))


@pytest.fixture
def decoded(monkeypatch):
    """Frames that are decoded, as they come."""
    decode, frames = VideoStream.decode, []
    monkeypatch.setattr(VideoStream, "decode", lambda *a: (frames.append(f) or f for f in decode(*a)))
    return frames


@pytest.mark.parametrize("name", ["mp4-h264-b2-open", "ts-h264-b2-open", "avi-mpeg4-b2"])
def test_strides_rates_and_starts_count_frames_alike_in_every_container(tmp_path, name):
    path = CASES[name].write(tmp_path)
    rows, bucket = [Row(name, "", {"target": path})], [Bucket(5, 64, 64)]

    def found(steps=24, **arguments):
        clips = Clips(rows, bucket, **arguments)
        return {tuple(numbers(clips.clip(0, 0, step).videos["target"])) for step in range(steps)}

    assert found(stride=3, starts=3) == {(0, 3, 6, 9, 12), (14, 17, 20, 23, 26), (27, 30, 33, 36, 39)}
    assert found(fps=12.5, starts=2) == {(0, 2, 4, 6, 8), (30, 32, 34, 36, 38)}
    assert found(fps=50.0, starts=2) == {(0, 0, 1, 1, 2), (37, 38, 38, 39, 39)}
    assert len(found(30)) > 15  # of the 36 first frames that there are


@pytest.mark.parametrize("name", ["mp4-h264-b2-open", "mkv-h264-b2-open", "ts-h264-b2-open", "flv-h264", "avi-mpeg4"])
def test_decoding_begins_at_a_key_frame_where_that_is_safe(tmp_path, decoded, name):
    footage = open_footage(CASES[name].write(tmp_path), name)
    assert isinstance(footage.timeline, Stamped)
    assert len(decoded) == 1
    list(footage.frames_at([37 / RATE]))
    assert len(decoded) <= 1 + 20  # from the last key frame or the one before it


@pytest.mark.parametrize("name", ["mp4-h264-b2-edits", "avi-mpeg4-b2"])
def test_decoding_begins_at_the_first_frame_elsewhere(tmp_path, decoded, name):
    footage = open_footage(CASES[name].write(tmp_path), name)
    assert isinstance(footage.timeline, Ordered)
    assert len(decoded) == footage.timeline.count
    list(footage.frames_at([footage.timeline.last]))
    assert len(decoded) == 2 * footage.timeline.count


def test_the_times_of_a_file_are_read_from_bytes_as_well(tmp_path):
    path = CASES["ts-h264-b2-open"].write(tmp_path)
    footage = open_footage(path.read_bytes, "cell")
    assert numbers(torch.stack(list(footage.frames_at([n / RATE for n in (7, 23, 39)])))) == [7, 23, 39]


# --- pictures that move -----------------------------------------------------------------------------------------------

STAMPS = [0.0, 0.04, 0.12, 0.16, 0.36]


def animation(path, count=5):
    """Yellow squares that move, with a hole through which the background is seen."""
    frames = []
    for number in range(count):
        pixels = np.zeros((32, 48, 4), np.uint8)
        pixels[...] = (20 + 40 * number, 60, 60, 255)
        pixels[8:16, 6 * number : 6 * number + 8] = (255, 255, 0, 255)
        pixels[24:] = 0
        frames.append(pixels)
    durations = [40, 80, 40, 200, 40][:count]
    first, *others = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=others, duration=durations, disposal=2, lossless=True)
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) / 255
    return pixels[:, :3] * pixels[:, 3:] + 1 - pixels[:, 3:]


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.apng"])
@pytest.mark.parametrize("cell", [False, True], ids=["file", "bytes"])
def test_animations_are_videos(tmp_path, name, cell):
    path = tmp_path / name
    frames = animation(path)
    footage = open_footage(path.read_bytes if cell else path, name, background=1.0)
    assert footage.seconds == pytest.approx(0.4)
    assert (torch.stack(list(footage.frames_at(STAMPS))) - frames).abs().max() < 0.01


def test_a_gif_of_one_frame_is_a_still_and_an_animated_webp_is_refused(tmp_path):
    animation(tmp_path / "one.gif", 1)
    assert isinstance(open_footage(tmp_path / "one.gif", "one"), Still)
    animation(tmp_path / "a.webp")
    with pytest.raises(BadFile, match="animated WebP; save it as GIF, APNG or mp4"):
        open_footage(tmp_path / "a.webp", "a.webp")


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(UsageError, match="the file is empty; copy or download it again"):
        read_video(tmp_path / "a.mp4")


# --- colours ----------------------------------------------------------------------------------------------------------

# ITU-T H.273, table 4: weights of red and blue in luma.
WEIGHTS = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087)}
WEIGHTS[9] = (0.2627, 0.0593)


def flat(pixels, values, matrix, full):
    """A frame whose planes have these values, of which 1 is 255 in 8 bits."""
    frame = av.VideoFrame(32, 16, pixels)
    bits = frame.format.components[0].bits
    for plane, value in zip(frame.planes, values, strict=True):
        kind = np.uint8 if bits == 8 else np.uint16
        samples = plane.height * plane.line_size // kind().itemsize
        plane.update(np.full(samples, round(value * 2 ** (bits - 8)), kind).tobytes())
    frame.colorspace, frame.color_range = matrix, 2 if full else 1
    return frame


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p", "yuv422p10le", "yuv444p12le"])
@pytest.mark.parametrize("full", [False, True], ids=["studio", "full"])
def test_colours_of_every_matrix_and_range_are_right(pixels, full):
    for matrix, (red, blue) in WEIGHTS.items():
        for colour in ((0, 0, 0), (1, 1, 1), (0.8, 0.15, 0.35), (0.1, 0.25, 0.85)):
            r, g, b = colour
            y = red * r + (1 - red - blue) * g + blue * b
            u, v = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
            # Full range of n bits ends at 2^n - 1, which is not 255 * 2^(n - 8).
            top = 256 - 2.0 ** (8 - int(av.VideoFormat(pixels).components[0].bits))
            values = (y * top, 128 + u * top, 128 + v * top) if full else (16 + 219 * y, 128 + 224 * u, 128 + 224 * v)
            shown = upright_rgb(flat(pixels, values, matrix, full))
            assert (shown - torch.tensor(colour)[:, None, None]).abs().max() < 1.4 / 255


@pytest.mark.parametrize("pixels", ["gray", "gray10le", "gray16le"])
def test_grey_is_of_full_range_unless_it_is_tagged(pixels):
    top = 256 - 2.0 ** (8 - int(av.VideoFormat(pixels).components[0].bits))
    for level in (0.0, 0.5, 1.0):
        for full, value in ((True, level * top), (False, 16 + 219 * level)):
            assert (upright_rgb(flat(pixels, (value,), 2, full)) - level).abs().max() < 1.2 / 255


def test_colours_that_cannot_be_converted_are_refused():
    with pytest.raises(BadFile, match=r"cannot convert .*yuv444p, colour matrix 8 of H.273.*; encode it as yuv420p"):
        upright_rgb(flat("yuv444p", (80, 150, 110), 8, False))

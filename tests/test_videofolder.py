"""From files to clips: folders, tables, every kind of unusual or bad file, lazy reading, the cache on disk."""

import contextlib
import io
import json
import random
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import tiny_vaes
import torch
from av.video.reformatter import ColorRange, Colorspace, ColorTrc
from PIL import Image

from chopgrad_align.common.errors import UsageError
from chopgrad_align.data import cache as cache_module
from chopgrad_align.data import video_file
from chopgrad_align.data.buckets import Box, Bucket, choose_bucket, crop_box, cut, resize
from chopgrad_align.data.cache import Cache, fingerprint, latents
from chopgrad_align.data.clips import Clips
from chopgrad_align.data.degradations import BoxMask, Downscale
from chopgrad_align.data.footage import open_footage
from chopgrad_align.data.order import batch_at
from chopgrad_align.data.procedural import texture_clip
from chopgrad_align.data.source import BadFile, Row
from chopgrad_align.data.table import is_one_split, read_dataset
from chopgrad_align.data.video_stream import VideoStream
from chopgrad_align.data.videofolder import read_folder

HEIGHT, WIDTH, RATE = 48, 64, 25


def numbered(count, height=HEIGHT, width=WIDTH):
    """Frames whose brightness says their number (modulo 40): `(F, H, W, 3)` bytes."""
    levels = 10 + 6 * (np.arange(count) % 40)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).astype(np.uint8)


def numbers(video):
    """The numbers of frames `(F, 3, H, W)`."""
    return ((video.mean((1, 2, 3)) * 255 - 10) / 6).round().int().tolist()


def corners(count=6):
    """Frames with a red corner at the top left, and a green one at the top right."""
    frames = np.full((count, HEIGHT, WIDTH, 3), 40, np.uint8)
    frames[:, : HEIGHT // 2, : WIDTH // 2] = (220, 30, 30)
    frames[:, : HEIGHT // 2, WIDTH // 2 :] = (30, 200, 30)
    return frames


def encode(
    path,
    frames,
    codec="libx264",
    pix_fmt="yuv420p",
    *,
    gop=10,
    milliseconds=None,
    options=None,
    container=None,
    setup=None,
    title=None,
):
    """Write a real file; `setup(stream)` sets what is unusual about it; `title` is in Latin-1."""
    with av.open(str(path), "w", options=container or {}, metadata_encoding="latin-1") as output:
        if title:
            output.metadata["title"] = title
        stream = output.add_stream(
            codec, rate=RATE, options={"crf": "10", **(options or {})} if "264" in codec else options or {}
        )
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.gop_size = gop
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if setup:
            setup(stream)
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgba" if image.shape[2] == 4 else "rgb24")
            frame = frame.reformat(format=pix_fmt, dst_color_range=ColorRange.MPEG)
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def encode_audio(path):
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def read(path, times, **arguments):
    return torch.stack(list(open_footage(path, path.name, **arguments).frames_at(times)))


def clips_of(path, bucket=(4, HEIGHT, WIDTH), **arguments):
    return Clips([Row(path.name, "", {"target": path})], [Bucket(*bucket)], **arguments)


# --- listing ----------------------------------------------------------------------------------------------------------


def test_a_folder_without_metadata_lists_its_videos_and_folders_of_frames(tmp_path):
    for name in ("b.mp4", "cover.jpg", "deep/er/a.MKV", "notes.txt", ".hidden.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "frames").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "frames" / "1.png")
    rows = read_folder(tmp_path)
    assert [row.name for row in rows] == ["b.mp4", "deep/er/a.MKV", "frames"]
    assert all(row.caption == "" and set(row.sources) == {"target"} for row in rows)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_gives_captions_and_roles(tmp_path, kind):
    values = [{"hq": "x/a.mp4", "lq": "y/a.mp4", "text": "a, b"}, {"hq": "x/c.mp4", "lq": "y/c.mp4", "text": ""}]
    text = (
        "\n".join(json.dumps(v) for v in values)
        if kind == "jsonl"
        else 'hq,lq,text\nx/a.mp4,y/a.mp4,"a, b"\nx/c.mp4,y/c.mp4,'
    )
    (tmp_path / f"metadata.{kind}").write_text(text)
    rows = read_folder(tmp_path, {"target": "hq", "degraded": "lq", "caption": "text"})
    assert [(row.name, row.caption) for row in rows] == [("x/a.mp4", "a, b"), ("x/c.mp4", "")]
    assert rows[1].sources == {"target": tmp_path / "x/c.mp4", "degraded": tmp_path / "y/c.mp4"}


def test_the_usual_columns_need_no_naming_and_captions_may_be_absent(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.mp4,hello")
    assert read_folder(tmp_path)[0].caption == "hello"
    (tmp_path / "metadata.csv").write_text("file_name\na.mp4")
    assert read_folder(tmp_path)[0].caption == ""


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(UsageError, match="holds no videos"):
        read_folder(tmp_path)
    with pytest.raises(UsageError, match="holds no metadata"):
        read_folder(tmp_path, {"target": "file_name"})
    (tmp_path / "metadata.csv").write_text("file_name,captoin\na.mp4,hello")
    with pytest.raises(UsageError, match="no column 'caption' for caption; did you mean 'captoin'"):
        read_folder(tmp_path, {"target": "file_name", "caption": "caption"})
    with pytest.raises(UsageError, match="one for a role with files, such as 'target'"):
        read_folder(tmp_path, {"caption": "captoin"})
    (tmp_path / "metadata.csv").write_text("file_name\n \nb.mp4")
    with pytest.raises(UsageError, match="expected a path as 'file_name'"):
        read_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("{}")
    with pytest.raises(UsageError, match="remove one"):
        read_folder(tmp_path)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.avi"])
def test_any_frame_of_any_container_is_the_right_one(tmp_path, name):
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    path = encode(tmp_path / name, numbered(40), codec, options={"qmin": "1", "qmax": "8"} if codec == "mpeg4" else {})
    footage = open_footage(path, name)
    assert (footage.height, footage.width, footage.fps) == (HEIGHT, WIDTH, RATE)
    assert footage.seconds == pytest.approx(40 / RATE, abs=0.01)
    for start in range(0, 37, 3):
        video = torch.stack(list(footage.frames_at([(start + i) / RATE for i in range(3)])))
        assert video.shape == (3, 3, HEIGHT, WIDTH)
        assert numbers(video) == [start, start + 1, start + 2]


def test_a_clip_from_the_end_of_a_long_file_reads_little_of_it(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), dtype=np.uint8)
    frames = np.concatenate([np.roll(noise, i, 2) for i in range(600)])
    path = encode(tmp_path / "long.mp4", frames, gop=20, options={"preset": "ultrafast", "crf": "20"})
    decoded, read_bytes = [], [0]

    class Counting(io.BytesIO):
        def read(self, size=-1):
            data = super().read(size)
            read_bytes[0] += len(data)
            return data

    decode, opened = VideoStream.decode, av.open
    monkeypatch.setattr(VideoStream, "decode", lambda *a: (decoded.append(f.pts) or f for f in decode(*a)))
    monkeypatch.setattr(av, "open", lambda file, *a, **b: opened(Counting(Path(file).read_bytes()), *a, **b))
    footage = open_footage(path, "long")
    assert len(decoded) == 1
    assert read_bytes[0] < path.stat().st_size / 4
    read_bytes[0] = 0
    list(footage.frames_at([(580 + i) / RATE for i in range(10)]))
    assert len(decoded) - 1 <= 20 + 10 + 1  # from the key frame before, and one to see that the last has ended
    assert read_bytes[0] < path.stat().st_size / 4


def test_variable_frame_rates_become_fixed_by_their_time_stamps(tmp_path):
    stamps = np.concatenate([[0], np.cumsum([40, 10, 200, 33, 17, 100] * 5)]).tolist()
    path = encode(tmp_path / "vfr.mp4", numbered(len(stamps)), milliseconds=stamps)
    footage = open_footage(path, "vfr")
    times = [i * 0.05 for i in range(36)]
    slack = 0.25 / footage.fps
    shown = [max(n for n, stamp in enumerate(stamps) if stamp / 1000 <= time + slack) for time in times]
    assert numbers(torch.stack(list(footage.frames_at(times)))) == shown
    # As clips at a fixed rate: 50 milliseconds a frame.
    clip = clips_of(path, (36, HEIGHT, WIDTH), fps=20.0, starts=1).clip(0)
    assert clip.fps == 20
    assert numbers(clip.videos["target"]) == [
        max(n for n, s in enumerate(stamps) if s <= 50 * i + 1000 * slack) for i in range(36)
    ]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_files_are_turned_upright(tmp_path, degrees):
    path = encode(tmp_path / "turned.mp4", corners(), setup=lambda stream: stream.set_display_rotation(degrees))
    with av.open(str(path)) as container:
        turns = next(container.decode(video=0)).rotation / 90  # counterclockwise
    plain = read(encode(tmp_path / "plain.mp4", corners()), [0.0])
    footage = open_footage(path, "turned")
    video = torch.stack(list(footage.frames_at([0.0])))
    assert turns % 4 != 0
    assert (footage.height, footage.width) == tuple(video.shape[2:])
    assert torch.equal(video, torch.rot90(plain, int(turns), (2, 3)))


def test_mirrored_files_are_mirrored_back(tmp_path):
    one = 1 << 16
    matrix = (-one, 0, 0, 0, one, 0, WIDTH * one, 0, 1 << 30)
    path = encode(tmp_path / "m.mp4", corners(), setup=lambda stream: stream.set_display_matrix(matrix))
    plain = read(encode(tmp_path / "plain.mp4", corners()), [0.0])
    assert torch.equal(read(path, [0.0]), plain.flip(3))


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("a.webm", "libvpx-vp9", "yuva420p"), ("a.mov", "prores_ks", "yuva444p10le"), ("b.mov", "png", "rgba")],
)
def test_transparent_files_are_laid_over_the_background(tmp_path, name, codec, pix_fmt):
    frames = np.full((5, HEIGHT, WIDTH, 4), 200, np.uint8)
    frames[..., 3] = np.repeat([0, 128, 255, 255], WIDTH // 4)
    path = encode(tmp_path / name, frames, codec, pix_fmt)
    for background in (0.0, 1.0):
        video = read(path, [0.0, 0.04], background=background)
        for part, alpha in ((8, 0.0), (24, 128 / 255), (56, 1.0)):
            wanted = alpha * 200 / 255 + (1 - alpha) * background
            assert (video[..., 12:36, part] - wanted).abs().max() < 0.03


def test_ten_bits_keep_their_depth(tmp_path):
    ramp = np.zeros((3, 64, 256), np.uint16)
    ramp[:] = 64 + np.arange(256) * 3  # luma between black and white, in steps that 8 bits do not have
    with av.open(str(tmp_path / "ten.mp4"), "w") as output:
        stream = output.add_stream("libx265", rate=RATE, options={"x265-params": "log-level=none:lossless=1"})
        stream.height, stream.width, stream.pix_fmt = 64, 256, "yuv420p10le"
        for luma in ramp:
            frame = av.VideoFrame(256, 64, "yuv420p10le")
            for plane, values in zip(frame.planes, (luma, *[np.full((32, 128), 512, np.uint16)] * 2), strict=True):
                padded = np.zeros((plane.height, plane.line_size // 2), np.uint16)
                padded[:, : plane.width] = values
                plane.update(padded.tobytes())
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    video = read(tmp_path / "ten.mp4", [0.0])
    wanted = torch.arange(256) * 3 / 876
    assert (video[0, :, 32] - wanted).abs().max() < 0.5 / 876
    assert len(video[0, 0, 32].unique()) == 256


@pytest.mark.parametrize(("height", "matrix"), [(48, Colorspace.ITU601), (720, Colorspace.ITU709)])
def test_untagged_colours_are_guessed_by_size(tmp_path, height, matrix):
    colour = np.full((3, height, 64, 3), (200, 40, 90), np.uint8)

    def in_matrix(image):
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        return frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=ColorRange.MPEG)

    with av.open(str(tmp_path / "a.mp4"), "w") as output:
        stream = output.add_stream("libx264", rate=RATE, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = height, 64, "yuv420p"
        for image in colour:
            frame = in_matrix(image)
            frame.colorspace = 2
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert next(container.decode(video=0)).colorspace == 2
    wanted = torch.tensor([200, 40, 90]) / 255
    assert (read(tmp_path / "a.mp4", [0.0]).mean((0, 2, 3)) - wanted).abs().max() < 0.015


def test_pixels_that_are_not_square_are_widened(tmp_path):
    def wide(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    video = read(encode(tmp_path / "wide.mp4", corners(), setup=wide), [0.0])
    assert video.shape == (1, 3, HEIGHT, round(WIDTH * 4 / 3))


def test_odd_sizes_are_cut_to_the_bucket(tmp_path):
    path = encode(tmp_path / "odd.mkv", numbered(8, 61, 87), "ffv1", "yuv444p")
    footage = open_footage(path, "odd")
    assert (footage.height, footage.width) == (61, 87)
    clip = clips_of(path, (4, 32, 48), starts=1).clip(0)
    assert clip.videos["target"].shape == (4, 3, 32, 48)
    assert numbers(clip.videos["target"]) == [0, 1, 2, 3]


def test_folders_of_frames_are_read_in_the_order_of_their_numbers(tmp_path):
    for number, image in enumerate(numbered(12)):
        Image.fromarray(image).save(tmp_path / f"frame{number}.png")
    clip = clips_of(tmp_path, (12, HEIGHT, WIDTH), folder_fps=10.0).clip(0)
    assert numbers(clip.videos["target"]) == list(range(12))
    assert clip.fps == 10


def test_names_with_digits_that_are_no_numbers_can_be_sorted(tmp_path):
    for name, level in (("2²3.png", 255), ("1.png", 0)):
        Image.new("L", (WIDTH, HEIGHT), level).save(tmp_path / name)
    assert read(tmp_path, [0.0, 0.05]).mean((1, 2, 3)).tolist() == [0, 1]


def test_a_title_that_is_not_utf8_is_no_reason_to_skip_a_file(tmp_path):
    path = encode(tmp_path / "café.avi", numbered(12), "mpeg4", title="Café")
    assert "Café".encode("latin-1") in path.read_bytes()
    assert numbers(read(path, [0.0, 0.2])) == [0, 5]


# --- bad files --------------------------------------------------------------------------------------------------------


def text_file(folder):
    (folder / "bad.mp4").write_text("I am not a video. " * 100)


def audio_file(folder):
    encode_audio(folder / "bad.m4a").rename(folder / "bad.mp4")


def truncated_file(folder):
    path = encode(folder / "bad.mp4", numbered(60), container={"movflags": "+faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - (len(data) - data.index(b"mdat")) // 2])


def headless_file(folder):
    path = encode(folder / "bad.mp4", numbered(60))
    path.write_bytes(path.read_bytes()[:-2000])  # the index is at the end


def truncated_matroska(folder):
    path = encode(folder / "bad.mkv", np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    path.rename(folder / "bad.mp4")


def short_file(folder):
    encode(folder / "bad.mp4", numbered(3))


def hdr_file(folder):
    def pq(stream):
        stream.codec_context.color_trc = ColorTrc.SMPTE2084

    encode(folder / "bad.mp4", numbered(12), setup=pq)


def slanted_file(folder):
    encode(folder / "bad.mp4", corners(12), setup=lambda stream: stream.set_display_rotation(30))


def empty_file(folder):
    (folder / "bad.mp4").touch()


def empty_folder(folder):
    (folder / "bad.mp4").mkdir()


def no_file(folder):
    pass


def sentence_for_a_name(folder):
    (folder / "metadata.csv").write_text(f"file_name\ngood.mp4\n{'a fox runs through snow ' * 20}")


def still_file(folder):
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "picture.png")
    (folder / "metadata.csv").write_text("file_name\ngood.mp4\npicture.png")


def unequal_frames(folder):
    (folder / "bad.mp4").mkdir()
    for number, size in enumerate([(32, 32), (48, 32)]):
        Image.new("RGB", size).save(folder / "bad.mp4" / f"{number}.png")


def unknown_codec(folder):
    path = encode(folder / "bad.mp4", numbered(12))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"none"))


def odd_length_tag(folder):
    path = encode(folder / "bad.mkv", numbered(12))
    data = path.read_bytes()
    assert data.count(b"00:00:00.480000000") == 1
    path.write_bytes(data.replace(b"00:00:00.480000000", b"half a second, say"))
    path.rename(folder / "bad.mp4")


def huge_pixels(folder):
    def wide(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    path = encode(folder / "bad.mov", numbered(12), "png", "rgb24", setup=wide)
    data = path.read_bytes()
    place = data.index(b"pasp") + 4
    path.write_bytes(data[:place] + struct.pack(">II", 2**30, 1) + data[place + 8 :])
    path.rename(folder / "bad.mp4")


def saved_noise(path, **arguments):
    """A picture of noise, as bytes."""
    path.parent.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **arguments)
    return path.read_bytes()


def broken_chunk(folder):
    path = folder / "bad.mp4" / "1.png"
    data = saved_noise(path)
    place = data.index(b"IDAT")
    # Pixels that end too soon, and then what is no chunk.
    path.write_bytes(data[: place - 4] + struct.pack(">I", 100) + data[place : place + 104] + bytes(100))


def broken_tag(folder):
    path = folder / "bad.mp4" / "1.tiff"
    data = saved_noise(path)
    offsets, floats = 273, 11  # the tag that says where the pixels are, and a type that no place in a file has
    place = data.index(struct.pack("<H", offsets))
    path.write_bytes(data[: place + 2] + struct.pack("<H", floats) + data[place + 4 :])


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (text_file, "unreadable"),
        (audio_file, "audio only"),
        (truncated_file, "truncated"),
        (headless_file, "unreadable"),
        (truncated_matroska, "truncated"),
        (short_file, "short"),
        (hdr_file, "HDR"),
        (slanted_file, "rotated"),
        (empty_file, "unreadable"),
        (empty_folder, "unreadable"),
        (no_file, "missing"),
        (sentence_for_a_name, "missing"),
        (still_file, "still"),
        (unequal_frames, "unreadable"),
        (unknown_codec, "codec"),
        (odd_length_tag, "unreadable"),
        (huge_pixels, "unreadable"),
        (broken_chunk, "unreadable"),
        (broken_tag, "unreadable"),
    ],
)
def test_a_bad_file_is_named_skipped_and_counted_or_fails(tmp_path, make, kind):
    encode(tmp_path / "good.mp4", numbered(12))
    (tmp_path / "metadata.csv").write_text("file_name\ngood.mp4\nbad.mp4")
    make(tmp_path)
    rows = read_folder(tmp_path)
    clips = Clips(rows, [Bucket(8, HEIGHT, WIDTH)])
    assert len(clips) == 1
    assert [bad.kind for bad in clips.bad] == [kind]
    bad_name = rows[1].name
    assert clips.bad[0].name == bad_name
    assert clips.summary().startswith(f"1 usable, 1 skipped: 1 {kind} ({bad_name}: ")
    assert clips.clip(0).name == "good.mp4"
    with pytest.raises(UsageError, match=f"bad file {bad_name} \\({kind}: "):
        Clips(rows, [Bucket(8, HEIGHT, WIDTH)], on_bad_file="error")
    with pytest.raises(UsageError, match="no clip can be cut"):
        Clips(rows[1:], [Bucket(8, HEIGHT, WIDTH)])


def test_a_file_that_turns_out_damaged_is_replaced_by_another(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3), dtype=np.uint8)
    path = encode(tmp_path / "hole.mp4", noise)
    data = bytearray(path.read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = bytes(third)
    path.write_bytes(data)
    encode(tmp_path / "good.mp4", numbered(60, 64, 64))
    rows = read_folder(tmp_path)
    bucket = [Bucket(40, 64, 64)]
    clips = Clips(rows, bucket)
    assert len(clips) == 2  # its beginning and its end are whole
    clip = clips.clip(1, seed=5)
    assert clip.name == "good.mp4"
    assert [(bad.name, bad.kind) for bad in clips.bad] == [("hole.mp4", "corrupt")]
    assert torch.equal(clip.videos["target"], Clips(rows, bucket).clip(1, seed=5).videos["target"])
    with pytest.raises(UsageError, match=r"hole.mp4 \(corrupt"):
        Clips(rows, bucket, on_bad_file="error").clip(1, seed=5)
    with pytest.raises(UsageError, match="in a row could not be read"):
        Clips(rows[1:], bucket).clip(0)


def mutated(data, rng):
    """A few bytes overwritten, made extreme, removed or cut off, most of them in the first kilobyte or the last."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        end = min(1024, len(data))
        place = rng.choice((rng.randrange(end), len(data) - 1 - rng.randrange(end), rng.randrange(len(data))))
        match rng.choice(("byte", "byte", "word", "remove", "cut")):
            case "byte":
                data[place] = rng.randrange(256)
            case "word":
                data[place : place + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4)))
            case "remove":
                del data[place : place + rng.randrange(1, 9)]
            case "cut" if rng.random() < 0.2:
                del data[max(place, 1) :]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # of Pillow, about the files
@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv", "a.png", "a.tiff"])
def test_whatever_a_file_holds_it_is_read_or_it_is_bad(tmp_path, name):
    path = tmp_path / name
    if path.suffix in (".png", ".tiff"):
        whole = saved_noise(tmp_path / "whole" / name)
    else:
        noise = np.random.default_rng(0).integers(0, 255, (8, 24, 32, 3), dtype=np.uint8)
        codec = "mpeg4" if name == "a.avi" else "libx264"
        whole = encode(path, noise, codec, gop=4, options={"preset": "ultrafast"}, title="Café").read_bytes()
    rng = random.Random(0)
    outcomes = set()
    for _ in range(150):
        path.write_bytes(mutated(whole, rng))
        try:
            footage = open_footage(path, name)
            outcomes.update(type(frame) for frame in footage.frames_at([0.0, 0.5 * min(footage.seconds, 1)]))
        except BadFile as bad:
            outcomes.add((bad.name, bool(bad.reason)))
        with contextlib.suppress(BadFile):
            video_file.all_frames(path, name)
    assert outcomes == {torch.Tensor, (name, True)}


# --- buckets and crops ------------------------------------------------------------------------------------------------


def test_buckets_are_chosen_by_length_shape_and_size():
    wide, tall, long, large = Bucket(9, 48, 80), Bucket(9, 80, 48), Bucket(33, 48, 80), Bucket(9, 480, 800)
    buckets = [wide, tall, long, large]
    assert choose_bucket(buckets, 20, 72, 128) == wide
    assert choose_bucket(buckets, 20, 128, 72) == tall
    assert choose_bucket(buckets, 40, 72, 128) == long
    assert choose_bucket(buckets, 20, 720, 1280) == large
    assert choose_bucket(buckets, 8, 72, 128) is None
    with pytest.raises(UsageError, match="positive"):
        Bucket(0, 48, 80)


def test_crops_keep_the_shape_and_native_ones_the_pixels():
    video = texture_clip(seed=0, frames=1, size=128)[:, 0, :96]
    box = crop_box(Bucket(1, 32, 32), 96, 128, "center", (0.0, 0.0))
    assert box == Box(0.0, 16 / 128, 1.0, 96 / 128)
    box = crop_box(Bucket(1, 32, 32), 96, 128, "native", (0.5, 1.0))
    assert torch.equal(cut(video, box, 32, 32), video[:, 32:64, 96:128])
    assert crop_box(Bucket(1, 32, 32), 96, 128, "random", (0.0, 1.0)) == Box(0.0, 32 / 128, 1.0, 0.75)
    # Too small for its own pixels: as much as there is.
    assert crop_box(Bucket(1, 192, 256), 96, 128, "native", (0.5, 0.5)) == Box(0.0, 0.0, 1.0, 1.0)


# --- clips ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three wide videos and two tall ones."""
    path = tmp_path_factory.mktemp("videos")
    for number in range(5):
        size = (48, 64) if number < 3 else (64, 48)
        encode(path / f"{number}.mp4", numbered(20 + number, *size))
    return path


def test_clips_are_a_function_of_seed_step_and_sample(folder):
    buckets = [Bucket(4, 24, 32), Bucket(4, 32, 24)]
    clips, again = (Clips(read_folder(folder), buckets, crop="random", mask=BoxMask()) for _ in range(2))
    keys = [(0, 1, 0, 0), (0, 1, 0, 1), (0, 1, 1, 0), (0, 2, 0, 0)]
    first = {key: clips.clip(*key).videos for key in keys}
    for key in reversed(keys):
        other = again.clip(*key).videos
        assert all(torch.equal(first[key][role], other[role]) for role in ("target", "mask", "degraded"))
    masks = [first[key]["mask"] for key in keys]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    assert len({numbers(clips.clip(0, 0, step).videos["target"])[0] for step in range(60)}) == 17  # every first frame


def test_stride_and_starts(folder):
    clips = Clips(read_folder(folder)[:1], [Bucket(4, 24, 32)], stride=3, starts=3)
    found = {tuple(numbers(clips.clip(0, 0, step).videos["target"])) for step in range(30)}
    assert found == {(0, 3, 6, 9), (5, 8, 11, 14), (10, 13, 16, 19)}
    assert clips.clip(0).fps == pytest.approx(RATE / 3)


def test_a_long_file_is_cut_into_clips_each_of_its_own(folder):
    clips = Clips(read_folder(folder)[1:2], [Bucket(5, 24, 32)], starts="all")
    found = [numbers(clips.clip(i, 0, step).videos["target"]) for step in range(2) for i in range(len(clips))]
    assert found == [list(range(start, start + 5)) for start in (0, 5, 11, 16)] * 2  # of 21 frames
    assert len(clips.captions) == 4
    assert {i for step in range(2) for i in clips.batch(step, 2, seed=0)} == {0, 1, 2, 3}


def test_pictures_are_clips_of_one_frame(tmp_path):
    picture = texture_clip(seed=1, frames=1, size=48)[:, 0]
    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    row = Row("a.png", "", {"target": tmp_path / "a.png"})
    clip = Clips([row], [Bucket(1, 48, 48)], degradation=Downscale((2, 2))).clip(0)
    assert clip.bucket == Bucket(1, 48, 48)
    assert (clip.videos["target"][0] - picture).abs().max() <= 0.5 / 255
    with pytest.raises(UsageError, match=r"1 still \(a\.png: a picture is no video, but of a bucket of one frame"):
        Clips([row], [Bucket(4, 48, 48)])


def test_batches_are_of_one_bucket_and_epochs_see_everything(folder):
    clips = Clips(read_folder(folder), [Bucket(4, 24, 32), Bucket(4, 32, 24)])
    batches = [clips.batch(step, 2, seed=3) for step in range(6)]
    assert all(len({clips.clip(i).videos["target"].shape for i in batch}) == 1 for batch in batches)
    for epoch in (batches[:3], batches[3:]):
        assert {i for batch in epoch for i in batch} == {0, 1, 2, 3, 4}
    groups = [list(range(10)), list(range(10, 15))]
    orders = [[batch_at(step, 4, groups, seed) for step in range(5)] for seed in range(4)]
    assert len({str(order) for order in orders}) == 4
    assert batch_at(0, 8, [[7]], 0) == [7] * 8


def pair_rows(tmp_path, scale=4):
    """A target, and the same `scale` times smaller."""
    target = texture_clip(seed=3, frames=8, size=128).transpose(0, 1)
    for name, video in (("target", target), ("small", resize(target, 128 // scale, 128 // scale))):
        (tmp_path / name).mkdir()
        for number, frame in enumerate((video * 255).round().byte().permute(0, 2, 3, 1).numpy()):
            Image.fromarray(frame).save(tmp_path / name / f"{number:03d}.png")
    return {"target": tmp_path / "target", "degraded": tmp_path / "small"}


def test_pairs_are_cut_alike(tmp_path):
    rows = [Row("pair", "", pair_rows(tmp_path))]
    clips = Clips(rows, [Bucket(3, 64, 64)], crop="native")
    for step in range(4):
        videos = clips.clip(0, 0, step).videos
        small = resize(videos["target"], 16, 16)
        # Inside; at its edge a crop has no neighbours.
        shown = resize(videos["degraded"], 16, 16)[..., 2:-2, 2:-2]
        right = (shown - small[..., 2:-2, 2:-2]).abs().mean()
        wrong = (shown - small.roll(1, 3)[..., 2:-2, 2:-2]).abs().mean()
        assert right < 0.25 * wrong


def test_pairs_that_do_not_belong_together_are_bad(folder, tmp_path):
    wide, tall = folder / "0.mp4", folder / "3.mp4"
    long = encode(tmp_path / "long.mp4", numbered(60))
    rows = [Row("a", "", {"target": wide, "degraded": other}) for other in (wide, tall, long)]
    clips = Clips(rows, [Bucket(4, 24, 32)])
    assert len(clips) == 1
    assert [bad.kind for bad in clips.bad] == ["pair", "pair"]
    with pytest.raises(UsageError, match="its shape is not that of the target: 48x64 and 64x48"):
        Clips(rows[1:2], [Bucket(4, 24, 32)])
    with pytest.raises(UsageError, match=r"2\.40 s, and the target 0\.80 s"):
        Clips(rows[2:], [Bucket(4, 24, 32)])


def test_every_role_has_its_shape(folder, tmp_path):
    still, picture = tmp_path / "mask.png", tmp_path / "reference.jpg"
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(still)
    Image.new("RGB", (100, 100), (255, 0, 0)).save(picture)
    depth = tmp_path / "depth.png"
    Image.fromarray(np.full((48, 64), 32768, np.uint16)).save(depth)
    sources = {"target": folder / "0.mp4", "mask": still, "image": picture, "control": depth}
    clip = Clips([Row("a", "a caption", sources)], [Bucket(4, 24, 32)]).clip(0)
    assert clip.caption == "a caption"
    videos = clip.videos
    assert {role: tuple(v.shape) for role, v in videos.items()} == {
        "target": (4, 3, 24, 32),
        "mask": (4, 1, 24, 32),
        "image": (1, 3, 24, 32),
        "control": (4, 3, 24, 32),
        "degraded": (4, 3, 24, 32),
    }
    assert set(videos["mask"].unique().tolist()) == {0.0, 1.0}
    assert videos["mask"][..., 16:].all()
    assert not videos["mask"][..., :16].any()
    assert torch.equal(videos["degraded"][..., :16], videos["target"][..., :16])
    assert (videos["degraded"][..., 16:] == 0.5).all()
    assert (videos["control"] - 32768 / 65535).abs().max() < 1e-6
    assert (videos["image"].mean((0, 2, 3)) - torch.tensor([1.0, 0, 0])).abs().max() < 0.02


def test_degradations_are_made_on_the_fly_and_not_over_given_ones(folder):
    rows = read_folder(folder)[:1]
    videos = Clips(rows, [Bucket(4, 24, 32)], degradation=Downscale((4.0, 4.0))).clip(0).videos
    assert (videos["degraded"] - resize(resize(videos["target"], 6, 8), 24, 32)).abs().max() < 1e-6
    given = [Row("a", "", {"target": folder / "0.mp4", "degraded": folder / "0.mp4"})]
    with pytest.raises(UsageError, match="'degraded', which is also made on the fly"):
        Clips(given, [Bucket(4, 24, 32)], degradation=Downscale())
    with pytest.raises(UsageError, match="positive stride"):
        Clips(rows, [Bucket(4, 24, 32)], stride=0)
    with pytest.raises(UsageError, match="at least one"):
        Clips(rows, [])


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_gives_the_same_clips_as_files(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    names = ["0.mp4", "1.mp4"]
    table = datasets.Dataset.from_dict(
        {
            "text": ["zero", None],
            "path": [str(folder / name) for name in names],
            "video": [str(folder / name) for name in names],
            "raw": [(folder / name).read_bytes() for name in names],
            "mask": [[Image.new("L", (64, 48), 255)] * 30] * 2,
        },
        features=datasets.Features(
            {
                "text": datasets.Value("string"),
                "path": datasets.Value("string"),
                "video": datasets.Video(),
                "raw": datasets.Value("binary"),
                "mask": datasets.List(datasets.Image()),
            }
        ),
    )
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "table"))
    files = Clips(read_folder(folder)[:2], [Bucket(4, 24, 32)])
    for column in ("path", "video", "raw"):
        rows = read_dataset(str(tmp_path / "table"), {"target": column, "caption": "text"})
        clips = Clips(rows, [Bucket(4, 24, 32)])
        assert [clips.clip(i).caption for i in range(2)] == ["zero", ""]
        assert all(torch.equal(clips.clip(i, 7).videos["target"], files.clip(i, 7).videos["target"]) for i in range(2))
    columns = {"target": "raw", "mask": "mask"}
    masked = Clips(read_dataset(str(tmp_path / "table"), columns), [Bucket(4, 24, 32)], folder_fps=37.5).clip(0)
    assert masked.videos["mask"].all()
    with pytest.raises(UsageError, match="no column 'pat' for target; did you mean 'path'"):
        read_dataset(str(tmp_path / "table"), {"target": "pat"})
    for split in ("test", "train[:1]"):
        with pytest.raises(UsageError, match=r"split '(test|train\[:1\])', give one of"):
            read_dataset(str(tmp_path / "table"), {"target": "path"}, split=split)
    with pytest.raises(UsageError, match="cannot open the data set"):
        read_dataset(str(tmp_path / "none"), {"target": "path"})
    numbers_table = datasets.Dataset.from_dict({"n": [1, 2]})
    numbers_table.save_to_disk(str(tmp_path / "numbers"))
    with pytest.raises(UsageError, match="expected a column of videos"):
        read_dataset(str(tmp_path / "numbers"), {"target": "n"})


def test_a_data_set_saved_without_splits_is_all_of_any_split_and_no_part_of_one(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"path": [str(folder / f"{number}.mp4") for number in range(3)]})
    table.select([0, 1]).save_to_disk(str(tmp_path / "a"))
    table.select([2]).save_to_disk(str(tmp_path / "b"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "named"))
    rows = [read_dataset(str(tmp_path / n), {"target": "path"}, s) for n, s in (("a", "train"), ("b", "test"))]
    paths = [[row.sources["target"]() for row in part] for part in rows]
    assert paths == [[folder / "0.mp4", folder / "1.mp4"], [folder / "2.mp4"]]
    one_split = [name for name in ("a", "b", "named", "named/train", "none") if is_one_split(str(tmp_path / name))]
    assert one_split == ["a", "b", "named/train"]
    for split in ("train[:1]", "train+test"):
        with pytest.raises(UsageError, match="was saved without splits"):
            read_dataset(str(tmp_path / "a"), {"target": "path"}, split)


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'chopgrad-align\[datasets\]'"):
        read_dataset("any", {"target": "video"})


# --- the cache --------------------------------------------------------------------------------------------------------


def test_the_cache_computes_once_for_each_content_and_setting(tmp_path):
    calls = []

    def get(cache, content, **settings):
        value = torch.full((2, 3), float(len(calls)))

        def compute():
            calls.append(content)
            return {"x": value}

        return cache.get(content, settings, compute)["x"]

    cache = Cache(tmp_path / "new")
    first = get(cache, "a prompt", length=8)
    assert torch.equal(get(Cache(tmp_path / "new"), "a prompt", length=8), first)
    get(cache, "a prompt", length=9)
    get(cache, "another", length=8)
    video = torch.rand(2, 3, 4, 4)
    get(cache, video, length=8)
    get(cache, video.clone(), length=8)
    get(cache, video.view(2, 3, 2, 8), length=8)
    assert len(calls) == 5
    assert (cache.hits, cache.misses, cache.damaged) == (1, 5, 0)
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * len(data)]
)
def test_a_damaged_entry_is_computed_again(tmp_path, damage):
    cache = Cache(tmp_path)
    value = {"x": torch.arange(1000.0)}
    cache.get("a", {}, lambda: value)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    assert torch.equal(cache.get("a", {}, lambda: value)["x"], value["x"])
    assert (cache.misses, cache.damaged) == (2, 1)
    cache.get("a", {}, lambda: pytest.fail("it was written again"))


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    with pytest.raises(ZeroDivisionError):
        cache.get("a", {}, lambda: {"x": torch.tensor(1 / 0)})
    monkeypatch.setattr(
        cache_module.safetensors.torch, "save", lambda tensors: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(UsageError, match="full"):
        cache.get("a", {}, lambda: {"x": torch.ones(1)})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_latents_are_the_vae_s_own_and_belong_to_its_weights(tmp_path):
    vae, cache = tiny_vaes.wan_vae(), Cache(tmp_path)
    video = texture_clip(seed=1, frames=5, size=16).transpose(0, 1)
    with torch.no_grad():
        wanted = vae.encode((2 * video - 1).transpose(0, 1)[None]).latent_dist.mode()[0]
    assert torch.equal(latents(cache, vae, video), wanted)
    assert torch.equal(latents(cache, vae, video), wanted)
    assert (cache.hits, cache.misses) == (1, 1)
    before = fingerprint(vae)
    with torch.no_grad():
        next(vae.parameters()).mul_(1.001)
    assert fingerprint(vae) != before
    assert not torch.equal(latents(cache, vae, video), wanted)
    assert fingerprint(vae.half()) != fingerprint(vae.float())


def test_bad_files_say_what_is_wrong():
    assert str(BadFile("short", "a.mp4", "3 frames")) == "a.mp4 (short: 3 frames)"

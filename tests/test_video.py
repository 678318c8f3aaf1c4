import random

import av
import pytest
import torch

from chopgrad_align.common.errors import UsageError
from chopgrad_align.data.procedural import random_scene, render, texture_clip
from chopgrad_align.data.video import read_video, write_video
from chopgrad_align.evaluation.sheet import contact_sheet


def psnr(a, b):
    return -10 * torch.log10((a - b).square().mean()).item()


def test_round_trip_keeps_frames_rate_and_pixels(tmp_path):
    video = texture_clip(seed=1, frames=9, size=64).transpose(0, 1)
    back, fps = read_video(write_video(tmp_path / "new" / "clip.mp4", video, fps=12.5))
    assert back.shape == video.shape
    assert back.dtype == torch.float32
    assert fps == pytest.approx(12.5)
    assert psnr(back, video) > 35
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize(
    "colour", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)]
)
def test_flat_colours_do_not_shift(tmp_path, colour):
    video = torch.tensor(colour).view(1, 3, 1, 1).expand(3, 3, 32, 32)
    back, _ = read_video(write_video(tmp_path / "clip.mp4", video, fps=8))
    assert (back - video).abs().max() < 3 / 255


def test_the_file_is_what_browsers_play(tmp_path):
    video = render(random_scene(random.Random(0)), seed=0, frames=5).transpose(0, 1)
    path = write_video(tmp_path / "clip.mp4", video, fps=8)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.codec_context.colorspace == 1  # BT.709, not "unspecified"
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_odd_sizes_are_padded_by_their_edge(tmp_path):
    video = texture_clip(seed=2, frames=3, size=63).transpose(0, 1)[..., :61]
    back, _ = read_video(write_video(tmp_path / "clip.mp4", video, fps=8))
    assert back.shape == (3, 3, 64, 62)
    assert psnr(back[..., :63, :61], video) > 30


def test_half_precision_and_gradients_are_accepted(tmp_path):
    video = torch.full((2, 3, 16, 16), 0.5, dtype=torch.bfloat16, requires_grad=True)
    write_video(tmp_path / "clip.mp4", video, fps=8)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(3, 16, 16), "expected a video"),
        (torch.zeros(2, 1, 16, 16), "expected a video"),
        (torch.zeros(0, 3, 16, 16), "expected a video"),
        (torch.full((2, 3, 16, 16), -1.0), r"\[0, 1\]"),
        (torch.full((2, 3, 16, 16), torch.nan), r"\[0, 1\]"),
    ],
)
def test_what_is_not_a_video_is_refused(tmp_path, video, message):
    with pytest.raises(UsageError, match=message):
        write_video(tmp_path / "clip.mp4", video, fps=8)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_place_is_refused_and_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        write_video(tmp_path / "file" / "clip.mp4", torch.zeros(2, 3, 16, 16), fps=8)

    path = write_video(tmp_path / "clip.mp4", torch.zeros(2, 3, 16, 16), fps=8)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("chopgrad_align.data.video.encode_video", full)
    with pytest.raises(UsageError, match="No space left"):
        write_video(path, torch.ones(2, 3, 16, 16), fps=8)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "file"]


def test_reading_what_is_no_video_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        read_video(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(UsageError, match="cannot read"):
        read_video(tmp_path / "text.mp4")


def test_frames_of_several_sizes_are_refused(tmp_path):
    parts = []
    for size in (32, 64):
        with av.open(str(tmp_path / "part.ts"), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.height, stream.width, stream.pix_fmt = size, size, "yuv420p"
            for _ in range(3):
                container.mux(stream.encode(av.VideoFrame(size, size, "yuv420p")))
            container.mux(stream.encode())
        parts.append((tmp_path / "part.ts").read_bytes())
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    with pytest.raises(UsageError, match="size becomes 64x64 midway"):
        read_video(tmp_path / "both.ts")


def test_contact_sheet_shows_the_pixels_in_their_places():
    red, blue = (torch.tensor(c).view(1, 3, 1, 1).expand(5, 3, 16, 24) for c in ([1.0, 0, 0], [0, 0, 1.0]))
    sheet = contact_sheet({"before": [red, red], "after": [blue, blue]}, ["one", "two"], frames=3, height=48)
    pixels = list(sheet.get_flattened_data() if hasattr(sheet, "get_flattened_data") else sheet.getdata())
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert pixels.count(colour) == 2 * 3 * 48 * 72
    with pytest.raises(UsageError, match="each of 2 captions"):
        contact_sheet({"before": [red]}, ["one", "two"])

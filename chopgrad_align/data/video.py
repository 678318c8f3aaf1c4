"""Video files: h264 in mp4, written and read through PyAV, whose wheels bring their own codecs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
import torch.nn.functional as F
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from torch import Tensor

from ..common.errors import UsageError
from ..common.files import whole_file
from .source import BadFile
from .video_file import all_frames

_BT709 = 1  # ITU-T H.273: the number of BT.709 as primaries, as transfer function and as matrix
_STUDIO_RANGE = 1  # libavutil's AVCOL_RANGE_MPEG

# Close to transparent at 480p; at 64x64 the quality is limited by the chroma subsampling that browsers ask for.
_QUALITY = {"crf": "14"}  # x264's constant rate factor: 0 is lossless, 23 its default


def write_video(path: str | Path, video: Tensor, fps: float) -> Path:
    """Write an mp4 (h264, 4:2:0, BT.709) that every browser plays; it appears under its name only when it is complete.

    Args:
        path: The file; an existing one is replaced and missing folders are made.
        video: `(F, 3, H, W)` in [0, 1]. h264 needs even sizes: an odd one gets its last row or column twice.
        fps: Frames a second.

    Returns:
        `path`.

    Raises:
        UsageError: not such a video, or the file cannot be written.
    """
    path = Path(path)
    if video.ndim != 4 or video.shape[1] != 3 or 0 in video.shape:
        raise UsageError(f"expected a video (frames, 3, height, width) for {path}, got shape {tuple(video.shape)}")
    if not 0 < fps <= 1000:
        raise UsageError(f"expected a positive number of frames a second, up to 1000, for {path}, got {fps}")
    video = video.detach().float().cpu()
    lowest, highest = video.min().item(), video.max().item()
    if not (lowest > -0.01 and highest < 1.01):  # written so that NaN fails too
        raise UsageError(f"expected pixels in [0, 1] for {path}, got [{lowest:.3g}, {highest:.3g}]")

    height, width = video.shape[2:]
    video = F.pad(video, (0, width % 2, 0, height % 2), mode="replicate")
    pixels = (video.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    try:
        with whole_file(path) as partial:
            encode_video(partial, pixels, fps, _QUALITY)
    except av.error.FFmpegError as error:  # the codec's: the disk's are OSErrors too
        raise UsageError(
            f"cannot encode the video {path}, {height}x{width} at {fps:g} frames a second: {error.strerror}"
        ) from error
    return path


def encode_video(path: Path, pictures: Iterable[np.ndarray], fps: float, options: Mapping[str, str]) -> None:
    """Encode pictures as h264 in mp4, one in memory at a time.

    Args:
        path: The file.
        pictures: uint8, `(H, W, 3)`, of one even size; at least one.
        fps: Frames a second.
        options: Of the encoder, x264.
    """
    pictures = iter(pictures)
    first = next(pictures)
    # The index goes to the front of the file ("faststart"), so that a page plays it before it has all of it.
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options=dict(options))
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], "yuv420p"
        # Without these tags each player guesses the matrix, and colours shift between players.
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _STUDIO_RANGE
        for picture in chain([first], pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.BICUBIC,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_video(path: str | Path) -> tuple[Tensor, float]:
    """Read every frame of a video file, upright and converted as `video_file` says.

    Returns:
        float32 video `(F, 3, H, W)` in [0, 1], and its average frames a second.

    Raises:
        UsageError: no such file, or no video in it.
    """
    try:
        return all_frames(Path(path), str(path))
    except BadFile as bad:
        raise UsageError(f"cannot read the video {bad}; give an mp4, webm or mov file") from None

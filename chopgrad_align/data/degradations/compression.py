"""Compression by the real codecs."""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from torch import Tensor

from ...common.errors import UsageError
from ..video_file import upright_rgb
from .base import check_ranges, integer

_BT601 = 6  # ITU-T H.273


@dataclass(frozen=True)
class Jpeg:
    """Every frame through libjpeg, 4:2:0, all with the same quality: blocks, ringing, washed-out colours."""

    quality: tuple[int, int] = (30, 95)
    """1 to 100, better."""

    def __post_init__(self) -> None:
        check_ranges(self, 1, 100, "quality")

    def degrade(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """See `Degradation.degrade`."""
        quality = integer(self.quality, generator)
        frames = []
        for image in _bytes(video):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:2:0")
            frames.append(torch.from_numpy(np.array(Image.open(file))))
        return (torch.stack(frames).permute(0, 3, 1, 2).float() / 255).to(video)


@dataclass(frozen=True)
class VideoCodec:
    """The clip through a real video encoder: h264 (x264) or MPEG-4 part 2, whose artefacts move with the motion.

    Odd sizes are padded by their last row or column for the encoder, and cropped again.
    """

    crf: tuple[int, int] = (23, 40)
    """x264's constant rate factor: 0 is lossless, 23 its default, 51 the worst. MPEG-4: its quantiser, 1 to 31."""
    codec: Literal["h264", "mpeg4"] = "h264"
    preset: Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow"] = "veryfast"
    """Preset of x264; faster ones have fewer tools and thus more artefacts, as hardware and live encoders have."""

    def __post_init__(self) -> None:
        if self.codec not in ("h264", "mpeg4"):
            raise UsageError(f"VideoCodec(codec={self.codec!r}): expected h264 or mpeg4")
        check_ranges(self, *((0, 51) if self.codec == "h264" else (1, 31)), "crf")

    def degrade(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """See `Degradation.degrade`."""
        crf = integer(self.crf, generator)
        height, width = video.shape[2:]
        padded = _bytes(F.pad(video, (0, width % 2, 0, height % 2), mode="replicate"))

        encoder = av.VideoCodecContext.create("libx264" if self.codec == "h264" else "mpeg4", "w")
        encoder.height, encoder.width, encoder.pix_fmt = *padded.shape[1:3], "yuv420p"
        encoder.framerate, encoder.time_base = Fraction(24), Fraction(1, 24)
        encoder.thread_count = 1  # the same bits on every machine
        if self.codec == "h264":
            # With its macroblock tree x264 now and then writes other bits for the same small frames (seen in some
            # processes, once in hundreds of clips), even in one thread; without it, never.
            encoder.options = {"crf": str(crf), "preset": self.preset, "x264-params": "mbtree=0"}
        else:
            encoder.options = {"qmin": str(crf), "qmax": str(crf)}
        packets = []
        for number, image in enumerate(padded):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG
            )
            frame.pts = number
            packets += encoder.encode(frame)
        packets += encoder.encode()

        decoder = av.VideoCodecContext.create(self.codec, "r")
        decoder.extradata = encoder.extradata
        images = []
        for packet in [*packets, None]:
            for frame in decoder.decode(packet):
                frame.colorspace = _BT601  # as it was encoded; MPEG-4 cannot say it
                images.append(upright_rgb(frame))
        return torch.stack(images)[..., :height, :width].to(video)


def _bytes(video: Tensor) -> np.ndarray:
    """`(F, H, W, 3)`."""
    return (video.detach().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()

"""A decoded frame as it is meant to be seen, whatever its pixel format.

- *Rotated or mirrored* (a phone's display matrix): turned upright. *Pixels that are not square*: widened.
- *10 bit and more*: converted to float at full depth. High dynamic range (PQ and HLG) is refused: without tone mapping
  its pixels do not mean what those of other files mean.
- *Alpha*: taken as straight (not premultiplied) and laid over a background.
- *Untagged colours*: BT.709 above standard definition and BT.601 below, the guess of most players. *Grey* is of full
  range unless it is tagged.
- *Chroma* is interpolated, not repeated.
- *Interlaced*: the two fields stay woven, as they are coded.
"""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import ColorRange, Colorspace, ColorTrc
from torch import Tensor

from .source import BadFile
from .stills import over

_UNSPECIFIED = 2  # ITU-T H.273
_BLACK, _WHITE = 16 / 255, 235 / 255  # of studio range
_HDR = {int(ColorTrc.SMPTE2084): "PQ", int(ColorTrc.ARIB_STD_B67): "HLG"}


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
        BadFile: It has high dynamic range, is rotated by what is not a quarter turn, or has a pixel format or colour
            matrix that FFmpeg cannot convert.
    """
    if frame.color_trc in _HDR:
        raise BadFile("HDR", name, f"high dynamic range ({_HDR[frame.color_trc]}); tone-map it to BT.709 first")
    components = frame.format.components
    alpha = any(component.is_alpha for component in components)
    grey = len(components) - alpha == 1
    untagged = frame.colorspace == _UNSPECIFIED and not (frame.format.is_rgb or grey)
    high_definition = frame.width >= 1280 or frame.height > 576
    try:
        # Planes of 16 bits: the conversion of libswscale that interpolates chroma and keeps all bits. (Its planes of
        # floats do so as well, but read uninitialised memory where the width is not a multiple of 4.)
        planes = frame.reformat(
            width=round(frame.width * (aspect or 1)),
            format="gbrap16le" if alpha else "gbrp16le",
            src_colorspace=Colorspace.ITU709 if untagged and high_definition else None,
        ).to_ndarray()
    except (OSError, av.error.FFmpegError, ValueError, ArithmeticError) as error:
        kind = f"{frame.width}x{frame.height}, {frame.format.name}, colour matrix {frame.colorspace} of H.273"
        said = f"FFmpeg cannot convert its frames ({kind}: {getattr(error, 'strerror', None) or error})"
        raise BadFile("unreadable", name, f"{said}; encode it as yuv420p in BT.709") from None
    # It shifts values to 16 bits and leaves the low ones empty, so that white comes out a little too dark.
    bits = min(components[0].bits, 16)
    full_range = frame.format.is_rgb or (frame.color_range == ColorRange.JPEG and not grey)
    white = (2**bits - 1) << (16 - bits) if full_range else 255 << 8
    pixels = torch.from_numpy(planes.astype(np.float32)).permute(2, 0, 1) / white
    if grey and frame.color_range == ColorRange.MPEG:  # it takes all grey for full range
        pixels[:3] = (pixels[:3] - _BLACK) / (_WHITE - _BLACK)
    pixels = pixels.clamp(0, 1)
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

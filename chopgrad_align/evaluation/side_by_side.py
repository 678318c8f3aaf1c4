"""Videos side by side, each under its name."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_NARROWEST, _WIDEST = 192, 3840  # pixels: of a video, so that its name fits, and of a row of them, which browsers play
_INK, _PAPER, _GAP = "#f2f2f2", "#16181b", 4


def side_by_side(videos: Mapping[str, Tensor], narrowest: int = _NARROWEST) -> Tensor:
    """Lay out videos in a row, or in rows of equal length where one would be too wide.

    Small videos are enlarged by a whole factor, pixel by pixel; none is made smaller.

    Args:
        videos: Names and videos `(F, 3, H, W)` in [0, 1] of one shape.
        narrowest: Pixels that a video is wide at least.

    Returns:
        `(F, 3, height, width)` in [0, 1], both even.
    """
    frames, _, height, width = next(iter(videos.values())).shape
    scale = max(1, math.ceil(narrowest / width))
    height, width = height * scale, width * scale
    most = max(1, (_WIDEST + _GAP) // (width + _GAP))
    rows = math.ceil(len(videos) / most)
    columns = math.ceil(len(videos) / rows)
    letters = max(13.0, width * 0.045)
    font, band = ImageFont.load_default(letters), round(letters * 1.7)
    down, right = rows * (band + height + _GAP) - _GAP, columns * (width + _GAP) - _GAP
    sheet = Image.new("RGB", (right + right % 2, down + down % 2), _PAPER)
    draw = ImageDraw.Draw(sheet)
    corners = [
        ((band + height + _GAP) * row + band, (width + _GAP) * column)
        for row in range(rows)
        for column in range(columns)
    ]
    for name, (top, left) in zip(videos, corners, strict=False):
        draw.text((left + width / 2, top - band / 2), _fitting(name, font, width - 8), _INK, font, anchor="mm")
    labels = torch.from_numpy(np.array(sheet)).permute(2, 0, 1).float() / 255
    out = labels.repeat(frames, 1, 1, 1)
    for video, (top, left) in zip(videos.values(), corners, strict=False):
        pixels = F.interpolate(video.detach().float().cpu(), scale_factor=scale, mode="nearest-exact")
        out[:, :, top : top + height, left : left + width] = pixels
    return out


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"

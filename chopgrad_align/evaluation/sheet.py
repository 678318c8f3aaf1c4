"""Frames of videos side by side as one still picture, for places that do not play video."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..common.errors import UsageError
from ..common.files import whole_file
from ..data.video import read_video

_INK, _PAPER, _GAP = "#222222", "#ffffff", 6


def contact_sheet(
    videos: Mapping[str, Sequence[Tensor]], captions: Sequence[str], frames: int = 4, height: int = 96
) -> Image.Image:
    """Lay out evenly spaced frames: a row for each caption, a block of columns for each heading.

    Args:
        videos: Headings (such as "before" and "after") and their videos, `(F, 3, H, W)` in [0, 1], one a caption.
        captions: Written above their row.
        frames: How many frames of each video to show, the first and the last included.
        height: Of a frame, in pixels of the picture.

    Raises:
        UsageError: another number of videos than of captions, or a tensor that is not a video.
    """
    for heading, group in videos.items():
        if len(group) != len(captions):
            raise UsageError(f"expected a video for each of {len(captions)} captions, got {len(group)} {heading!r}")
    font, bold = ImageFont.load_default(height * 0.16), ImageFont.load_default(height * 0.2)
    line = round(height * 0.28)
    strips = [[_strip(group[row], frames, height) for group in videos.values()] for row in range(len(captions))]
    widths = [max((strip.width for strip in column), default=0) for column in zip(*strips, strict=True)]
    lefts = [2 * _GAP + sum(widths[:i]) + 3 * _GAP * i for i in range(len(widths))]
    row_height = line + height + 2 * _GAP
    sheet = Image.new(
        "RGB", (lefts[-1] + widths[-1] + 2 * _GAP, _GAP + line + len(captions) * row_height + _GAP), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for left, heading in zip(lefts, videos, strict=True):
        draw.text((left, _GAP), heading, _INK, bold)
    for row, caption in enumerate(captions):
        top = _GAP + line + row * row_height
        draw.text((lefts[0], top + line - _GAP // 2), caption, _INK, font, anchor="ls")
        for left, strip in zip(lefts, strips[row], strict=True):
            sheet.paste(strip, (left, top + line))
    return sheet


def draw_samples(run: str | Path, most: int = 6) -> Path | None:
    """Write `samples.png` of a run: its first samples before and after, from their files; None if it has none."""
    folder = Path(run) / "samples"
    names = sorted(path.name for path in (folder / "before").glob("*.mp4") if (folder / "after" / path.name).is_file())
    if not names:
        return None
    names = names[:most]
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    videos = {side: [read_video(folder / side / name)[0] for name in names] for side in ("before", "after")}
    path = Path(run) / "samples.png"
    sheet = contact_sheet(videos, [prompts[int(Path(name).stem)] for name in names])
    with whole_file(path) as partial:
        sheet.save(partial, format="png")
    return path


def _strip(video: Tensor, frames: int, height: int) -> Image.Image:
    if video.ndim != 4 or video.shape[1] != 3:
        raise UsageError(f"expected a video (frames, 3, height, width), got shape {tuple(video.shape)}")
    chosen = video[torch.linspace(0, len(video) - 1, frames).round().long()].detach().float().cpu()
    width = round(chosen.shape[3] * height / chosen.shape[2])
    # Tiny videos are shown pixel by pixel, not as a blur; large ones are averaged down.
    mode = "nearest-exact" if height >= chosen.shape[2] else "area"
    pixels = F.pad(F.interpolate(chosen, (height, width), mode=mode), (0, 2), value=1.0)  # a white seam between frames
    joined = pixels.permute(2, 0, 3, 1).flatten(1, 2)[:, :-2]
    return Image.fromarray((joined.clamp(0, 1) * 255).round().byte().numpy())

"""Frames of videos side by side as one still picture, for places that do not play video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..common.errors import UsageError
from ..common.files import whole_file
from ..data.video import read_video
from .run_files import RunFiles, read_json
from .samples import find_samples, grouped

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
    """Write `samples.png` of a run: the samples that its page shows first, before and after; None if there are none."""
    files = RunFiles(Path(run))
    gains = [after - before for before, after in zip(files.scores("before"), files.scores("after"), strict=True)]
    ordered = [s for _, group in grouped(find_samples(files.folder / "samples", gains, files.after)) for s in group]
    samples = [sample for sample in ordered if {"before", "after"} <= sample.sides.keys()][:most]
    if not samples:
        return None
    prompts = read_json(files.folder / "samples" / "prompts.json", list)
    videos = {side: [_some_frames(sample.sides[side]) for sample in samples] for side in ("before", "after")}
    path = files.folder / "samples.png"
    sheet = contact_sheet(videos, [prompts[sample.place] for sample in samples])
    with whole_file(path) as partial:
        sheet.save(partial, format="png")
    return path


def _some_frames(path: Path, frames: int = 4) -> Tensor:
    """Evenly spaced frames, so that no more than one whole video is in memory."""
    video = read_video(path)[0]
    return video[_spaced(len(video), frames)].clone()


def _spaced(count: int, frames: int) -> Tensor:
    return torch.linspace(0, count - 1, frames).round().long()


def _strip(video: Tensor, frames: int, height: int) -> Image.Image:
    if video.ndim != 4 or video.shape[1] != 3:
        raise UsageError(f"expected a video (frames, 3, height, width), got shape {tuple(video.shape)}")
    chosen = video[_spaced(len(video), frames)].detach().float().cpu()
    width = round(chosen.shape[3] * height / chosen.shape[2])
    # Tiny videos are shown pixel by pixel, not as a blur; large ones are averaged down.
    mode = "nearest-exact" if height >= chosen.shape[2] else "area"
    pixels = F.pad(F.interpolate(chosen, (height, width), mode=mode), (0, 2), value=1.0)  # a white seam between frames
    joined = pixels.permute(2, 0, 3, 1).flatten(1, 2)[:, :-2]
    return Image.fromarray((joined.clamp(0, 1) * 255).round().byte().numpy())

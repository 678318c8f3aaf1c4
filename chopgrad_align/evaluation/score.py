"""Score video files by a reward, one after the other, of each the frames that it reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from ..common.errors import UsageError, located
from ..data.sound import read_sound
from ..data.source import VIDEO_SUFFIXES, BadFile
from ..data.table_file import file_text, read_table, text_cell
from ..data.video_file import VideoFile
from ..objective.reward import Reduction, Reward
from ..objective.reward.protocol import at_fps, check_scores, frames_read, reads_audio, reads_sample, score_chosen
from .row_sample import row_sample


@dataclass(frozen=True)
class Clip:
    """A video file and what it should show.

    Attributes:
        row: Further columns of its table, for rewards that read them.
        folder: Paths in there are relative to it.
    """

    video: Path
    prompt: str
    row: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path()


@dataclass(frozen=True)
class Scored:
    """A clip and its score, or why it has none, or none that is a number."""

    clip: Clip
    score: float | None
    reason: str = ""


def find_clips(videos: Sequence[Path], tables: Sequence[Path], prompt: str | None) -> list[Clip]:
    """The clips that files, folders and tables name.

    Args:
        videos: Video files, and folders of them, which are searched through all levels, in the order of their names.
        tables: Files that `read_table` reads, with the columns `video`, a path relative to the file, and `prompt`;
            others are for rewards that read them, see `row_sample`.
        prompt: Of all files that have none of their own. A table's row has its column, a file `a.mp4` a text file
            `a.txt` beside it.

    Raises:
        UsageError: A table that cannot be read, a folder without videos, or a video without a prompt.
    """
    clips = []
    for path in videos:
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise UsageError(f"{path} holds no video ({', '.join(sorted(VIDEO_SUFFIXES))})")
        for video in found:
            beside = video.with_suffix(".txt")
            own = file_text(beside).strip() if beside.is_file() else prompt
            clips.append(Clip(video, _given(own, str(video))))
    for table in tables:
        read = read_table(table)
        for place, row in read.rows:
            if not isinstance(row.get("video"), str) or not row["video"]:
                columns = ", ".join(read.columns) or "nothing"
                raise UsageError(f"{read.named(place)}: expected a path as `video` (columns: {columns})")
            own = row.get("prompt")
            with located(read.named(place)):
                text = prompt if own is None else text_cell(own)
            rest = {name: cell for name, cell in row.items() if name != "video" and cell not in (None, "")}
            clips.append(Clip(table.parent / row["video"], _given(text, read.named(place)), rest, table.parent))
    return clips


def _given(prompt: str | None, whose: str) -> str:
    if prompt is None:
        raise UsageError(
            f"{whose} has no prompt: give --prompt (an empty one, if the reward reads none), a column `prompt`, "
            "or a text file beside the video"
        )
    return prompt


def score_clips(
    reward: Reward, name: str, clips: Sequence[Clip], device: torch.device, reduce: Reduction | None = None
) -> Iterator[Scored]:
    """Score clip after clip, without a gradient; a file that cannot be read is handed back with the reason.

    Rewards that depend on the frames a second get those of the file, unless they were told others. Only the frames that
    the reward reads are kept, a chunk at a time where they are scored alone. Random frames are the same each time.
    Scores of frames are reduced by `reduce`, to their mean if it is None.

    Raises:
        UsageError: Scores that break the contract of rewards.
    """
    for clip in clips:
        try:
            yield _score(reward, name, clip, device, reduce)
        except BadFile as bad:
            yield Scored(clip, None, f"cannot read the video {bad}; give an mp4, webm or mov file")


@torch.no_grad()  # nothing is trained
def _score(reward: Reward, name: str, clip: Clip, device: torch.device, reduce: Reduction | None) -> Scored:
    file = VideoFile.open(clip.video, str(clip.video), background=0.0)
    reward = at_fps(reward, file.fps)
    (read,) = frames_read(reward, max(1, round(file.seconds * file.fps)), [0])
    times = [number / file.fps for number in read]
    sample = None
    if reads_sample(reward):
        sound = read_sound(clip.video, str(clip.video)) if reads_audio(reward) else None
        sample = row_sample({**clip.row, "prompt": clip.prompt}, clip.folder, file.fps, times, file.seconds, sound)
        sample = sample.to(device)
    frames = (frame.to(device) for frame in file.frames_at(times))
    with located(f"reward {name!r}"):
        scores = score_chosen(reward, frames, clip.prompt, sample, reduce)
    value = check_scores(f"reward {name!r}", scores, 1).item()
    return Scored(clip, value, "" if math.isfinite(value) else f"the score of {clip.video} is {value}, not a number")


def summary(results: Sequence[Scored]) -> str:
    """Mean and standard error of the scores, and the files that have none, in words."""
    scores = [scored.score for scored in results if scored.score is not None and not scored.reason]
    text = f"{len(scores)} scored"
    if scores:
        text += f", mean {fmean(scores):.5g}"
    if len(scores) > 1:
        text += f" ± {stdev(scores) / len(scores) ** 0.5:.2g} (standard error)"
    failed = [scored for scored in results if scored.reason]
    if failed:
        text += f"; {len(failed)} not scored:" + "".join(f"\n  {scored.reason}" for scored in failed)
    return text

"""Score video files by a reward, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch

from ..common.errors import UsageError, located
from ..data.source import VIDEO_SUFFIXES
from ..data.table_file import file_text, read_table, text_cell
from ..data.video import read_video
from ..objective.reward import Reward
from ..objective.reward.protocol import check_scores, score


@dataclass(frozen=True)
class Clip:
    """A video file and what it should show."""

    video: Path
    prompt: str


@dataclass(frozen=True)
class Scored:
    """A clip and its score, or why it has none."""

    clip: Clip
    score: float | None
    reason: str = ""


def find_clips(videos: Sequence[Path], tables: Sequence[Path], prompt: str | None) -> list[Clip]:
    """The clips that files, folders and tables name.

    Args:
        videos: Video files, and folders of them, which are searched through all levels, in the order of their names.
        tables: Files that `read_table` reads, with the columns `video`, a path relative to the file, and `prompt`.
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
            clips.append(Clip(table.parent / row["video"], _given(text, read.named(place))))
    return clips


def _given(prompt: str | None, whose: str) -> str:
    if prompt is None:
        raise UsageError(
            f"{whose} has no prompt: give --prompt (an empty one, if the reward reads none), a column `prompt`, "
            "or a text file beside the video"
        )
    return prompt


def score_clips(reward: Reward, name: str, clips: Sequence[Clip], device: torch.device) -> Iterator[Scored]:
    """Score clip after clip, without a gradient; a file that cannot be read is handed back with the reason.

    Random frames are the same each time.

    Raises:
        UsageError: Scores that break the contract of rewards.
    """
    for clip in clips:
        try:
            video, _ = read_video(clip.video)
        except UsageError as error:
            yield Scored(clip, None, str(error))
            continue
        with torch.no_grad():
            scores = score(reward, video[None].to(device), [clip.prompt], [0])
        yield Scored(clip, check_scores(f"reward {name!r}", scores, 1).item())


def summary(results: Sequence[Scored]) -> str:
    """Mean and standard error of the scores, and the files that could not be read, in words."""
    scores = [scored.score for scored in results if scored.score is not None]
    text = f"{len(scores)} scored"
    if scores:
        text += f", mean {fmean(scores):.5g}"
    if len(scores) > 1:
        text += f" ± {stdev(scores) / len(scores) ** 0.5:.2g} (standard error)"
    failed = [scored for scored in results if scored.score is None]
    if failed:
        text += f"; {len(failed)} not read:" + "".join(f"\n  {scored.reason}" for scored in failed)
    return text

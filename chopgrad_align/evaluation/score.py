"""Score video files by a reward, one after the other, of each the frames that it reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch

from ..common.errors import UsageError
from ..data.prompts import read_rows
from ..data.source import BadFile
from ..data.video_file import VideoFile
from ..objective.reward import Reward
from ..objective.reward.protocol import at_fps, check_scores, frames_read, score_chosen

_SUFFIXES = {".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}


@dataclass(frozen=True)
class Clip:
    """A video file and what it should show."""

    video: Path
    prompt: str


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
        tables: CSV or JSONL files with the columns (keys) `video`, a path relative to the file, and `prompt`.
        prompt: Of all files that have none of their own. A table's row has its column, a file `a.mp4` a text file
            `a.txt` beside it.

    Raises:
        UsageError: A table that cannot be read, a folder without videos, or a video without a prompt.
    """
    clips = []
    for path in videos:
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise UsageError(f"{path} holds no video ({', '.join(sorted(_SUFFIXES))})")
        for video in found:
            beside = video.with_suffix(".txt")
            own = _text(beside) if beside.is_file() else prompt
            clips.append(Clip(video, _given(own, str(video))))
    for table in tables:
        for line, row in read_rows(table):
            if not isinstance(row.get("video"), str) or not row["video"]:
                columns = ", ".join(map(str, row)) or "nothing"
                raise UsageError(f"{table}, line {line}: expected a path as `video` (columns: {columns})")
            own = row.get("prompt")
            clips.append(
                Clip(table.parent / row["video"], _given(prompt if own is None else own, f"{table}, line {line}"))
            )
    return clips


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the prompt in {path}: {error}; save it as UTF-8") from error


def _given(prompt: str | None, whose: str) -> str:
    if prompt is None:
        raise UsageError(
            f"{whose} has no prompt: give --prompt (an empty one, if the reward reads none), a column `prompt`, "
            "or a text file beside the video"
        )
    return prompt


def score_clips(reward: Reward, name: str, clips: Sequence[Clip], device: torch.device) -> Iterator[Scored]:
    """Score clip after clip, without a gradient; a file that cannot be read is handed back with the reason.

    Rewards that depend on the frames a second get those of the file, unless they were told others. Only the frames that
    the reward reads are kept, a chunk at a time where they are scored alone. Random frames are the same each time.

    Raises:
        UsageError: Scores that break the contract of rewards.
    """
    for clip in clips:
        try:
            yield _score(reward, name, clip, device)
        except BadFile as bad:
            yield Scored(clip, None, f"cannot read the video {bad}; give an mp4, webm or mov file")


@torch.no_grad()  # nothing is trained
def _score(reward: Reward, name: str, clip: Clip, device: torch.device) -> Scored:
    file = VideoFile.open(clip.video, str(clip.video), background=0.0)
    reward = at_fps(reward, file.fps)
    (read,) = frames_read(reward, max(1, round(file.seconds * file.fps)), [0])
    frames = (frame.to(device) for frame in file.frames_at([number / file.fps for number in read]))
    value = check_scores(f"reward {name!r}", score_chosen(reward, frames, clip.prompt), 1).item()
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

"""Clips of a data set: chosen by seed, step and sample, read lazily, cut to a bucket, degraded on the fly."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..common.errors import UsageError
from .buckets import Box, Bucket, Crop, choose_bucket, crop_box, cut, resize
from .degradations.base import Degradation
from .degradations.masks import Mask, covered
from .footage import Footage, open_footage
from .order import batch_at, mix, pick
from .source import BadFile, Row

_UNLIKE_SHAPES = 0.03  # between the two of a pair, as a part of width / height
_UNLIKE_SECONDS = 0.25  # between the lengths of the two of a pair
_MOST_REPLACEMENTS = 20
_NAMED = 3  # files of each kind in a summary

# What a random choice is for, so that choices do not depend on each other.
_START, _DOWN, _RIGHT, _DEGRADE, _REPLACE = range(5)


@dataclass(frozen=True)
class Clip:
    """A sample as the trainer sees it.

    `videos` has for each role a float32 tensor `(F, 3, H, W)` in [0, 1], all of the bucket's shape; that of `mask` is
    `(F, 1, H, W)`, 0 or 1, and that of `image`, a reference picture, `(1, 3, H, W)`. Another still is repeated for each
    frame.
    """

    name: str
    caption: str
    videos: dict[str, Tensor]
    fps: float


@dataclass(frozen=True)
class _Entry:
    row: Row
    footage: Mapping[str, Footage]
    bucket: Bucket
    fps: float
    frames: int
    """Length of the shortest role, at that rate."""


class Clips:
    """A data set of clips.

    All files are looked at when it is made (header, first frame, and where the file ends), and read when a clip is
    asked for.

    Args:
        rows: What `read_folder` or `read_dataset` return.
        buckets: Shapes of clips; each row gets the one nearest to its own.
        stride: Every how many frames one is taken.
        fps: Frames a second that every file is resampled to before the stride; None keeps each file's own rate (of a
            file of variable rate: its average).
        starts: Every row has so many clips, evenly spaced; None: any frame can be the first.
        crop: See `crop_box`.
        degradation: Makes `degraded` from `target`.
        mask: Draws `mask`. Whether drawn or read, what it covers is grey in `degraded`.
        on_bad_file: `skip` leaves bad files out, counts them (`summary`), and takes another clip for one that turns out
            to be damaged when it is read; `error` raises for the first.
        folder_fps: Frames a second of folders of frames.
        background: Grey level behind transparent pixels.

    Raises:
        UsageError: An argument is wrong, a file is bad and `on_bad_file` is `error`, or all of them are bad.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        buckets: Sequence[Bucket],
        *,
        stride: int = 1,
        fps: float | None = None,
        starts: int | None = None,
        crop: Crop = "center",
        degradation: Degradation | None = None,
        mask: Mask | None = None,
        on_bad_file: Literal["skip", "error"] = "skip",
        folder_fps: float = 24.0,
        background: float = 0.0,
    ) -> None:
        if not (rows and buckets):
            raise UsageError(f"expected at least one row and one bucket, got {len(rows)} and {len(buckets)}")
        if stride < 1 or (starts is not None and starts < 1) or (fps is not None and not fps > 0):
            raise UsageError(f"expected positive stride, starts and fps, got {stride}, {starts} and {fps}")
        for role, maker in (("degraded", degradation), ("mask", mask)):
            if maker is not None and any(role in row.sources for row in rows):
                raise UsageError(
                    f"the data has a column for {role!r}, which is also made on the fly; remove one of them"
                )
        self._buckets, self._stride, self._fps = buckets, stride, fps
        self._starts, self._crop, self._degradation, self._mask = starts, crop, degradation, mask
        self._skip, self._folder_fps, self._background = on_bad_file == "skip", folder_fps, background
        with ThreadPoolExecutor() as pool:
            looked = list(pool.map(self._look, rows))
        self._entries = [entry for entry in looked if isinstance(entry, _Entry)]
        self.bad = [entry for entry in looked if isinstance(entry, BadFile)]
        if self.bad and not self._skip:
            raise self._refusal(self.bad[0])
        if not self._entries:
            raise UsageError(f"no clip can be cut from the data: {self.summary()}")
        self._groups: dict[Bucket, list[int]] = {bucket: [] for bucket in sorted({e.bucket for e in self._entries})}
        for index, entry in enumerate(self._entries):
            self._groups[entry.bucket].append(index)

    def __len__(self) -> int:
        """How many rows clips can be cut from."""
        return len(self._entries)

    @property
    def captions(self) -> list[str]:
        """Caption of each row."""
        return [entry.row.caption for entry in self._entries]

    def batch(self, step: int, size: int, seed: int) -> list[int]:
        """Which rows the batch of a step has, all of one bucket: see `batch_at`."""
        return batch_at(step, size, list(self._groups.values()), seed)

    def clip(self, index: int, seed: int = 0, step: int = 0, sample: int = 0) -> Clip:
        """Read a clip of a row; which one is a function of the four numbers.

        Args:
            index: Of the row, below `len(self)`.
            seed: Of the run.
            step: Of the trainer.
            sample: Its place in the batch of that step.

        Raises:
            UsageError: A file is damaged, and `on_bad_file` is `error` or no other file can take its place.
        """
        group = self._groups[self._entries[index].bucket]
        for attempt in range(_MOST_REPLACEMENTS):
            try:
                return self._read(self._entries[index], mix(seed, step, sample))
            except BadFile as bad:
                if not self._skip:
                    raise self._refusal(bad) from bad
                if bad.name not in {known.name for known in self.bad}:
                    self.bad.append(bad)
                index = group[pick(len(group), seed, step, sample, _REPLACE, attempt)]
        raise UsageError(f"{_MOST_REPLACEMENTS} files in a row could not be read: {self.summary()}")

    def summary(self) -> str:
        """How many rows there are and which files were left out, in one line."""
        kept = f"{len(self._entries)} usable"
        kinds = Counter(bad.kind for bad in self.bad)
        lists = []
        for kind, count in kinds.most_common():
            of_kind = [bad for bad in self.bad if bad.kind == kind]
            names = ", ".join(bad.name for bad in of_kind[:_NAMED]) + (", …" if count > _NAMED else "")
            lists.append(f"{count} {kind} ({names}: {of_kind[0].reason})")
        return f"{kept}, {len(self.bad)} skipped" + (": " if lists else "") + "; ".join(lists)

    def _refusal(self, bad: BadFile) -> UsageError:
        return UsageError(f"bad file {bad}; remove it, or set on_bad_file=skip")

    def _look(self, row: Row) -> _Entry | BadFile:
        try:
            footage = {}
            for role, source in row.sources.items():
                name = row.name if role == "target" else f"{row.name}, {role}"
                footage[role] = open_footage(source, name, self._folder_fps, self._background)
            target = footage["target"]
            if target.seconds == math.inf:
                raise BadFile("still", row.name, "a picture is not a target video")
            for role, other in footage.items():
                _check_pair(target, role, other)
            fps = self._fps or target.fps
            frames = int(min(f.seconds for f in footage.values()) * fps + 0.05)
            bucket = choose_bucket(self._buckets, (frames - 1) // self._stride + 1, target.height, target.width)
            if bucket is None:
                shortest = (min(b.frames for b in self._buckets) - 1) * self._stride + 1
                raise BadFile("short", row.name, f"{frames} frames; the shortest clip spans {shortest}")
            return _Entry(row, footage, bucket, fps, frames)
        except BadFile as bad:
            return bad

    def _read(self, entry: _Entry, seed: int) -> Clip:
        target, bucket = entry.footage["target"], entry.bucket
        free = entry.frames - (bucket.frames - 1) * self._stride
        if self._starts is None:
            start = pick(free, seed, _START)
        else:
            start = round(pick(self._starts, seed, _START) * (free - 1) / max(self._starts - 1, 1))
        times = [(start + i * self._stride) / entry.fps for i in range(bucket.frames)]
        place = pick(2**20 + 1, seed, _DOWN) / 2**20, pick(2**20 + 1, seed, _RIGHT) / 2**20
        box = crop_box(bucket, target.height, target.width, self._crop, place)
        videos = {}
        for role, footage in entry.footage.items():
            if role == "image":
                middle = crop_box(bucket, footage.height, footage.width, "center", place)
                videos[role] = _cut_video(footage, times[:1], middle, bucket)
            else:
                videos[role] = _cut_video(footage, times, box, bucket)
        if "mask" in videos:
            videos["mask"] = (videos["mask"].mean(1, keepdim=True) >= 0.5).float()
        generator = torch.Generator().manual_seed(mix(seed, _DEGRADE))
        if self._mask is not None:
            videos["mask"] = self._mask.draw(bucket.frames, bucket.height, bucket.width, generator)
        if self._degradation is not None:
            degraded = self._degradation.degrade(videos["target"], generator)
            videos["degraded"] = resize(degraded, bucket.height, bucket.width)
        if "mask" in videos:
            videos["degraded"] = covered(videos.get("degraded", videos["target"]), videos["mask"])
        return Clip(entry.row.name, entry.row.caption, videos, entry.fps / self._stride)


def _check_pair(target: Footage, role: str, other: Footage) -> None:
    if role == "image":  # a reference picture has any shape
        return
    shapes = [f.width / f.height for f in (target, other)]
    if abs(shapes[1] / shapes[0] - 1) > _UNLIKE_SHAPES:
        sizes = f"{other.width}x{other.height} and {target.width}x{target.height}"
        raise BadFile("pair", other.name, f"its shape is not that of the target: {sizes}")
    if other.seconds != math.inf and abs(other.seconds - target.seconds) > _UNLIKE_SECONDS:
        raise BadFile("pair", other.name, f"{other.seconds:.2f} s, and the target {target.seconds:.2f} s")


def _cut_video(footage: Footage, times: Sequence[float], box: Box, bucket: Bucket) -> Tensor:
    # Frame by frame: a clip at the file's own size may not fit into memory.
    return torch.stack([cut(frame, box, bucket.height, bucket.width) for frame in footage.frames_at(times)])

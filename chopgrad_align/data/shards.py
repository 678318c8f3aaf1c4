"""WebDataset shards: tar files whose members with equal names, up to the suffix, are one sample.

The format is that of https://github.com/webdataset/webdataset: `000.mp4`, `000.txt` and `000.json` are the parts of the
sample `000`. Members are found once, and read where they lie.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import UsageError
from .captions import BESIDE, caption_of
from .listing import Listing
from .source import VIDEO_SUFFIXES, BadFile, Row


@dataclass(frozen=True)
class Member:
    """A part of a tar file, read when it is called."""

    tar: Path
    start: int
    size: int

    def __call__(self) -> bytes:
        try:
            with self.tar.open("rb") as file:
                file.seek(self.start)
                return file.read(self.size)
        except OSError as error:
            raise BadFile("unreadable", self.tar.name, str(error)) from None


def list_shards(tars: list[Path]) -> Listing:
    """List the samples of tar files: those with a video, with their captions.

    Raises:
        UsageError: A file that is no tar file, or a compressed one, or a caption that cannot be read.
    """
    listing = Listing()
    for tar in tars:
        samples: dict[str, dict[str, Member]] = {}
        for name, member in _members(tar):
            folder, _, base = name.rpartition("/")
            stem, dot, suffix = base.partition(".")  # up to the first dot, as there
            samples.setdefault(f"{folder}/{stem}".lstrip("/"), {})[f"{dot}{suffix}".lower()] = member
        for key, parts in samples.items():
            name = f"{tar.name}/{key}"
            videos = [suffix for suffix in parts if suffix in VIDEO_SUFFIXES]
            if len(videos) != 1:
                listing.left_out += [(f"with {len(videos) or 'no'} videos", name)]
                continue
            texts = {suffix: parts[suffix]() for suffix in BESIDE if suffix in parts}
            video = parts[videos[0]]
            listing.rows.append(Row(name + videos[0], caption_of(texts, name), {"target": video}, video))
            listing.left_out += [
                (f"of a suffix that is not read, {suffix or 'none'}", name)
                for suffix in parts
                if suffix not in (*videos, *texts)
            ]
    return listing


def _members(tar: Path) -> list[tuple[str, Member]]:
    try:
        # Not `r:*`: of a compressed file no part can be read where it lies.
        with tarfile.open(tar, "r:") as archive:
            return [
                (member.name, Member(tar.resolve(), member.offset_data, member.size))
                for member in archive
                if member.isfile() and not Path(member.name).name.startswith(".")
            ]
    except (OSError, tarfile.TarError) as error:
        raise UsageError(f"cannot read {tar} as a tar file: {error}; unpack it if it is compressed") from None

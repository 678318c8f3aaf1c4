"""A local folder as a data set: video files or folders of frames, with their captions in any of the usual places."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.arguments import nearest, readable_text
from ..common.errors import UsageError, located
from .captions import BESIDE, caption_of, files_beside
from .listing import Listing
from .shards import list_shards
from .source import MEDIA_SUFFIXES, STILL_SUFFIXES, VIDEO_SUFFIXES, Row
from .table_file import (
    CAPTION_NAMES,
    TABLE_SUFFIXES,
    TARGET_NAMES,
    Table,
    column_of,
    file_bytes,
    file_text,
    read_table,
    text_cell,
)

METADATA = tuple(f"metadata{suffix}" for suffix in TABLE_SUFFIXES)
_VIDEO_LIST = "videos.txt"
_CAPTION_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")


def read_folder(folder: str | Path, columns: Mapping[str, str] | None = None) -> list[Row]:
    """The samples of `list_folder`."""
    return list_folder(folder, columns).rows


def list_folder(folder: str | Path, columns: Mapping[str, str] | None = None, pictures: bool = False) -> Listing:
    """List a folder, a table or a shard; no video is opened.

    Captions are taken from `metadata` with a suffix of `TABLE_SUFFIXES`, each row of which is a sample; from the lines
    of `videos.txt` and `prompts.txt` (or `prompt.txt`, `captions.txt`); from shards (`.tar`) in the way of WebDataset;
    or from a file beside each clip (`fox.mp4`, `fox.txt`). Each of them holds for the folder that it is in, and for
    those below. Links are followed, into each folder once.

    Args:
        folder: Holds the videos, in subfolders if you like; or is itself a table, or a shard.
        columns: Which column (or key) of a table holds what: `target` and `caption`, and any of `degraded`, `mask`,
            `control`, `image`. Values are paths relative to the table, to a video, a folder of frames or a picture.
            Without a `target` the samples have none. Default: the target and the caption, by their usual names.
        pictures: Each picture is a sample, not each folder of them.

    Raises:
        UsageError: No such folder, nothing in it, two places for captions, one that cannot be read, or a column that is
            not there.
    """
    folder = Path(folder)
    if folder.is_file():
        listing, described = _of_file(folder, columns), True
    elif folder.is_dir():
        listing, described = _of_folder(folder, columns, pictures)
    else:
        raise UsageError(f"no folder {folder}; give one that holds videos")
    if columns and not described:
        raise UsageError(f"columns are given, and {folder} holds no metadata.csv or metadata.jsonl to have them")
    if not listing.rows:
        what = "pictures" if pictures else "videos and no folders of frames"
        kinds = ", ".join(sorted(STILL_SUFFIXES if pictures else VIDEO_SUFFIXES))
        raise UsageError(f"{folder} holds no {what} ({kinds}): {listing.summary()}")
    return listing


def check_columns(columns: Mapping[str, str] | None, there: list[str], where: str) -> dict[str, str]:
    """Find the column of each role.

    Args:
        columns: As for `list_folder`.
        there: The columns that there are.
        where: Names the table in messages.

    Raises:
        UsageError: A column is not there; names the nearest.
    """
    if not columns:
        usual = {"target": TARGET_NAMES, "caption": CAPTION_NAMES}
        found = {role: column_of(role, names, there, where) for role, names in usual.items()}
        if found["target"] is None:
            raise UsageError(
                f"{where} has no column for the target ({', '.join(TARGET_NAMES)}): name it as "
                f"data.clips.columns.target. It has: {', '.join(there)}"
            )
        return {role: column for role, column in found.items() if column is not None}
    chosen = {}
    for role, column in columns.items():
        same = [name for name in there if name == column] or [n for n in there if n.casefold() == column.casefold()]
        if len(same) != 1:
            hint = nearest(column, there)
            raise UsageError(f"{where} has no column {column!r} for {role}{hint}. It has: {', '.join(there)}")
        chosen[role] = same[0]
    if chosen.keys() <= {"caption"}:
        raise UsageError(f"columns: expected one for a role with files, such as 'target', got {chosen}")
    return chosen


def _of_file(path: Path, columns: Mapping[str, str] | None) -> Listing:
    if path.suffix.lower() == ".tar":
        return list_shards([path])
    return _of_table(read_table(path), columns)


def _of_folder(root: Path, columns: Mapping[str, str] | None, pictures: bool) -> tuple[Listing, bool]:
    """The list of a folder, and whether there was a table that has columns."""
    files_of, left_out = _search(root)
    listing, beside = Listing(), Listing()
    described: dict[Path, list[Path]] = {}
    used: set[Path] = set()
    for folder, files in files_of.items():
        if any(folder.is_relative_to(other) for other in described):
            continue
        if found := _captions_for(folder, [path.name for path in files]):
            described[folder] = found
            part = _of_lists(*found) if len(found) == 2 else _of_file(found[0], columns)
            listing.add(_below(part, folder.relative_to(root)))
            used.update(found)
            used.update(source for row in part.rows for source in row.sources.values() if isinstance(source, Path))
        elif tars := [path for path in files if path.suffix.lower() == ".tar"]:
            listing.add(_below(list_shards(tars), folder.relative_to(root)))
            used.update(tars)
        else:
            for clip in _clips(folder, files, pictures):
                texts = files_beside(clip)
                name = clip.relative_to(root).as_posix()
                caption = caption_of({suffix: file_bytes(path) for suffix, path in texts.items()}, name)
                beside.rows.append(Row(name, caption, {"target": clip}, clip.resolve()))
                used |= {clip, *texts.values()}
    beside.rows.sort(key=lambda row: Path(row.name))
    beside.add(listing)
    beside.left_out += left_out
    for folder, files in files_of.items():
        by = next((found[0].name for other, found in described.items() if folder.is_relative_to(other)), None)
        for path in files:
            if not used & {path, *path.parents}:
                beside.left_out.append((_why_not(path, by), path.relative_to(root).as_posix()))
    return beside, any(len(found) == 1 for found in described.values())


def _why_not(path: Path, described_by: str | None) -> str:
    suffix = path.suffix.lower()
    if suffix in MEDIA_SUFFIXES:
        return "beside videos" if described_by is None else f"not named in {described_by}"
    if suffix in TABLE_SUFFIXES and suffix != ".json":
        return "tables of another name than metadata"
    if suffix in BESIDE and described_by is None:
        return "texts without a clip of their name"
    return f"of a kind that is not read, {suffix or 'without a suffix'}"


def _search(root: Path) -> tuple[dict[Path, list[Path]], list[tuple[str, str]]]:
    """The files of each folder below one, and what else there is: why it is left out, and its name."""
    files_of: dict[Path, list[Path]] = {}
    left_out: list[tuple[str, str]] = []
    seen = {root.resolve()}  # a link can lead back
    waiting = [root]
    while waiting:
        folder, below = waiting.pop(), []
        files_of[folder] = []
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            left_out.append((f"unreadable, {error.strerror}", folder.relative_to(root).as_posix()))
            continue
        for entry in entries:
            reason = None
            if entry.name.startswith("."):
                reason = "hidden"
            elif entry.is_dir():
                if entry.resolve() in seen:
                    reason = "links to a folder that is listed already"
                else:
                    seen.add(entry.resolve())
                    below.append(entry)
            elif entry.is_file():
                files_of[folder].append(entry)
            else:
                reason = "links to nothing" if entry.is_symlink() else "neither files nor folders"
            if reason:
                left_out.append((reason, entry.relative_to(root).as_posix()))
        waiting += reversed(below)
    return files_of, left_out


def _captions_for(folder: Path, names: Collection[str]) -> list[Path]:
    """The table of a folder, or its lists of videos and of captions; empty if it has neither.

    Raises:
        UsageError: It has several.
    """
    tables = [name for name in METADATA if name in names]
    lists = [name for name in _CAPTION_LISTS if name in names] if _VIDEO_LIST in names else []
    if _VIDEO_LIST in names and not lists:
        raise UsageError(f"{folder} holds {_VIDEO_LIST} and no {' or '.join(_CAPTION_LISTS)}; add one, line by line")
    if len(found := tables + lists) > 1:
        raise UsageError(f"{folder} holds {' and '.join(found)}; remove one of them")
    return [folder / name for name in ([_VIDEO_LIST, *lists] if lists else tables)]


def _of_lists(videos: Path, captions: Path) -> Listing:
    """The clips of two files with a line for each: a path, and a caption."""
    paths, texts = ([line.strip() for line in file_text(path).split("\n")] for path in (videos, captions))
    for lines in (paths, texts):
        while lines and not lines[-1]:  # a text editor adds such lines, and takes them away
            lines.pop()
    if len(paths) != len(texts):
        raise UsageError(
            f"{videos} has {len(paths)} lines, and {captions.name} {len(texts)}: line by line a clip and its caption"
        )
    listing = Listing()
    for line, (path, text) in enumerate(zip(paths, texts, strict=True), 1):
        with located(f"{videos}, line {line}"):
            source = videos.parent / _path("path", path)
        with located(f"{captions}, line {line}"):
            listing.rows.append(Row(path, text_cell(text), {"target": source}, source.resolve()))
    return listing


def _of_table(table: Table, columns: Mapping[str, str] | None) -> Listing:
    if not table.rows:
        raise UsageError(f"{table.path} has no rows; write one for each clip")
    chosen = check_columns(columns, table.columns, str(table.path))
    listing = Listing(unread=[column for column in table.columns if column not in chosen.values()])
    folder = table.path.parent
    for place, cells in table.rows:
        with located(table.named(place)):
            sources = {}
            for role, column in chosen.items():
                if role != "caption":
                    sources[role] = folder / _path(column, cells[column])
            with located(f"column {chosen.get('caption')!r}"):
                caption = text_cell(cells[chosen["caption"]]) if "caption" in chosen else ""
            lead = next(iter(sources))
            name = cells[chosen["target" if "target" in chosen else lead]].strip()
            identity = sources["target"].resolve() if "target" in sources else None
            listing.rows.append(Row(name, caption, sources, identity))
    return listing


def _path(column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"expected a path as {column!r}, got {value!r}")
    return readable_text(value.strip())


def _clips(folder: Path, files: list[Path], pictures: bool) -> list[Path]:
    stills = [path for path in files if path.suffix.lower() in STILL_SUFFIXES]
    videos = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    if pictures:
        return stills
    # Pictures beside videos are not a video's frames.
    return videos or ([folder] if stills else [])


def _below(listing: Listing, folder: Path) -> Listing:
    """The same list with names from further up."""
    if folder == Path():
        return listing
    rows = [replace(row, name=(folder / row.name).as_posix()) for row in listing.rows]
    return replace(listing, rows=rows, left_out=[(why, (folder / n).as_posix()) for why, n in listing.left_out])

"""A local folder as a data set: video files or folders of frames, with or without a metadata file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..common.arguments import nearest
from ..common.errors import UsageError
from .prompts import _csv_rows, _json_rows
from .source import STILL_SUFFIXES, Row

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".y4m"})
COLUMNS = {"target": "file_name", "caption": "caption"}
_METADATA = {"metadata.csv": _csv_rows, "metadata.jsonl": _json_rows}


def read_folder(folder: str | Path, columns: Mapping[str, str] | None = None) -> list[Row]:
    """List a folder; no file is opened.

    With a `metadata.csv` (with a header) or `metadata.jsonl`, each of its rows is a sample. Without, each video file
    below the folder is one, and each folder of pictures, without a caption.

    Args:
        folder: Holds the videos, in subfolders if you like.
        columns: Which column (or key) holds what: `target` and `caption`, and any of `degraded`, `mask`, `control`,
            `image`. Values are paths relative to the folder, to a video, a folder of frames or a picture. Default:
            `file_name` is the target, and `caption` the caption, if there is such a column.

    Raises:
        UsageError: No such folder, no videos, two metadata files or one that cannot be read, or a column that is not
            there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"no folder {folder}; give one that holds videos")
    metadata = [folder / name for name in _METADATA if (folder / name).is_file()]
    if len(metadata) > 1:
        raise UsageError(f"{folder} holds metadata.csv and metadata.jsonl; remove one of them")
    if metadata:
        rows = list(_described(folder, metadata[0], columns))
    elif columns:
        raise UsageError(f"columns are given, and {folder} holds no metadata.csv or metadata.jsonl to have them")
    else:
        found = sorted(_videos(folder))
        rows = [Row(path.relative_to(folder).as_posix(), "", {"target": path}) for path in found]
    if not rows:
        raise UsageError(f"{folder} holds no videos ({', '.join(sorted(VIDEO_SUFFIXES))}) and no folders of frames")
    return rows


def check_columns(columns: Mapping[str, str] | None, there: list[str], where: str) -> dict[str, str]:
    """Complete the roles and look for their columns.

    Raises:
        UsageError: A column is not there; names the nearest.
    """
    chosen = (
        dict(columns)
        if columns
        else {role: column for role, column in COLUMNS.items() if role != "caption" or column in there}
    )
    if "target" not in chosen:
        raise UsageError(f"columns: expected one for the role 'target', got {chosen}")
    for role, column in chosen.items():
        if column not in there:
            hint = nearest(column, there)
            raise UsageError(f"{where} has no column {column!r} for {role}{hint}. It has: {', '.join(there)}")
    return chosen


def _described(folder: Path, file: Path, columns: Mapping[str, str] | None) -> Iterator[Row]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}: {error}; save it as UTF-8") from None
    chosen: dict[str, str] | None = None
    for line, values in _METADATA[file.name](file, text):
        if chosen is None or not values.keys() >= set(chosen.values()):
            chosen = check_columns(columns, [str(key) for key in values], f"{file}, line {line},")
        given = {role: values[column] for role, column in chosen.items()}
        caption = given.pop("caption", None) or ""
        for role, value in given.items():
            if not isinstance(value, str) or not value.strip():
                raise UsageError(f"{file}, line {line}: expected a path as {chosen[role]!r}, got {value!r}")
        yield Row(
            given["target"], str(caption).strip(), {role: folder / value.strip() for role, value in given.items()}
        )


def _videos(folder: Path) -> Iterator[Path]:
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    files = [entry for entry in entries if entry.suffix.lower() in VIDEO_SUFFIXES and not entry.is_dir()]
    yield from files
    # Pictures beside videos are not a video's frames.
    if not files and any(entry.suffix.lower() in STILL_SUFFIXES for entry in entries):
        yield folder
    for entry in entries:
        if entry.is_dir():
            yield from _videos(entry)

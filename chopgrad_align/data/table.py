"""A Hugging Face data set as rows, from the hub or from disk; cells are fetched when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..common.errors import UsageError, located
from .listing import Listing
from .source import BadFile, Content, Row
from .table_file import text_cell
from .videofolder import METADATA, check_columns


def is_saved_dataset(name: str) -> bool:
    """Tell whether it is a folder that `save_to_disk` wrote."""
    return is_one_split(name) or (Path(name) / "dataset_dict.json").is_file()


def is_one_split(name: str) -> bool:
    """Tell whether it is a folder of `Dataset.save_to_disk`: whatever split is asked for, it is all of the folder.

    (`DatasetDict.save_to_disk` writes several, by name.) Who reads two splits of one such folder reads the same twice.
    """
    return (Path(name) / "state.json").is_file()


def is_parquet_folder(name: str) -> bool:
    """Tell whether it is a folder with parquet files that are not the metadata of others: a data set of the hub."""
    if any((Path(name) / metadata).is_file() for metadata in METADATA):
        return False
    levels = ("*.parquet", "*/*.parquet")  # and not all of a large folder of videos
    return any(path.stem != "metadata" for level in levels for path in Path(name).glob(level))


def read_dataset(
    name: str, columns: Mapping[str, str] | None = None, split: str = "train", subset: str | None = None
) -> list[Row]:
    """The samples of `list_dataset`."""
    return list_dataset(name, columns, split, subset).rows


def list_dataset(
    name: str, columns: Mapping[str, str] | None = None, split: str = "train", subset: str | None = None
) -> Listing:
    """Open a data set and list its rows; captions are read, videos are not.

    `Clips` then looks at each cell once: at the head and the end of a file that a path names, and at all of one that is
    kept in the table itself.

    Args:
        name: Of the hub, or a folder: what `save_to_disk` wrote, or any that `load_dataset` reads.
        columns: Which column holds what, as for `list_folder`. A cell is a video, a picture, a list of pictures
            (frames) or a path (relative to the folder, if `name` is one).
        split: Such as `train`, or `train[:100]` where `load_dataset` does the reading. What `save_to_disk` wrote has
            only the splits that were saved, and a data set without splits is the whole of any (`is_one_split`).
        subset: The data set's configuration, if it has several.

    Raises:
        UsageError: The package `datasets` is not installed, there is no such data set, split or column, the split is an
            expression that a saved data set cannot answer, or a column holds something else.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise UsageError(
            "reading Hugging Face data sets needs a package: pip install 'chopgrad-align[datasets]'"
        ) from None

    if is_one_split(name) and any(sign in split for sign in "[+"):
        raise UsageError(
            f"the data set {name!r} was saved without splits, and has no {split!r}: give a bare name, such as 'train', "
            "for all of its rows, or save the rows that you want in a folder of their own"
        )
    try:
        if is_saved_dataset(name):
            table = datasets.load_from_disk(name)
        else:
            table = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(f"cannot open the data set {name!r} (split {split!r}): {error}") from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise UsageError(f"the saved data set {name!r} has no split {split!r}, give one of: {', '.join(table)}")
        table = table[split]

    chosen = check_columns(columns, table.column_names, f"the data set {name!r}")
    caption = chosen.pop("caption", None)
    for role, column in chosen.items():
        table = table.cast_column(column, _as_stored(datasets, table.features[column], f"{name}: {column!r} ({role})"))
    captions = table[caption] if caption else [""] * len(table)
    folder = Path(name) if Path(name).is_dir() else Path()
    part = "" if is_one_split(name) else split
    listing = Listing(unread=[c for c in table.column_names if c not in (caption, *chosen.values())])
    for i, value in enumerate(captions):
        row = f"{name}[{i}]"
        with located(f"{row}, column {caption!r}"):
            text = text_cell(value)
        sources = {role: partial(_cell, table, i, column, folder, row) for role, column in chosen.items()}
        listing.rows.append(Row(row, text, sources, (part, row)))
    return listing


def _as_stored(datasets: Any, feature: Any, what: str) -> Any:
    """The feature by which a column gives files as they are, not decoded."""
    match feature:
        case datasets.Video():
            return datasets.Video(decode=False)
        case datasets.Image():
            return datasets.Image(decode=False)
        case datasets.List(feature=datasets.Image()):
            return datasets.List(datasets.Image(decode=False))
        case datasets.Value(dtype="string" | "large_string" | "binary" | "large_binary"):
            return feature
    raise UsageError(f"{what}: expected a column of videos, pictures, lists of pictures or paths, got {feature}")


def _cell(table: Any, row: int, column: str, folder: Path, name: str) -> Content | list[Content]:
    # One column of one row: the others are not read.
    value = table.select_columns([column])[row][column]
    if isinstance(value, list):
        return [_content(part, folder, name) for part in value]
    return _content(value, folder, name)


def _content(value: Any, folder: Path, name: str) -> Content:
    if isinstance(value, dict):
        value = value["bytes"] or value["path"]
    if isinstance(value, bytes):
        return value
    if not value:
        raise BadFile("missing", name, "the cell is empty")
    return folder / value

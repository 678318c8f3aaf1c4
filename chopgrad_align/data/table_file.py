"""Tables of prompts and clips, read strictly: CSV, JSON, JSON lines and Parquet; each cell is text, or what JSON has.

What cannot be told for certain is refused, because a caption that is lost or garbled is trained on without a word.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.arguments import nearest, readable_text, shown, usable_path
from ..common.errors import UsageError, located
from .source import MEDIA_SUFFIXES

CAPTION_NAMES = ("caption", "text", "prompt")
"""Usual names of the column of captions."""
TARGET_NAMES = ("file_name", "video", "video_path", "file_path", "media_path", "path", "file", "filename")
"""Usual names of the column of files."""

_MOST_CHARACTERS = 20_000  # of a caption: several times what any text encoder reads
_SPACES = str.maketrans("\t\r\n", "   ")  # a caption may have several lines
_DELIMITERS = (",", "\t", ";")  # the first that the header has: a caption may have any of the others

Rows = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Table:
    """Rows of a file.

    Attributes:
        path: Of the file.
        columns: Of all rows together, in the order in which they come.
        rows: The place of each in the file, such as `line 2`, and its cells; None where a row has none.
    """

    path: Path
    columns: list[str]
    rows: Rows

    def named(self, place: str) -> str:
        """The name of a row in messages."""
        return f"{self.path}, {place}"


def read_table(path: Path) -> Table:
    """Read a file by its suffix: one of `TABLE_SUFFIXES`.

    `.csv` and `.tsv`: with a header, in UTF-8 (or UTF-16 with its mark), between commas, tabs or semicolons as the
    header has them, quotes doubled inside quotes. `.jsonl` and `.ndjson`: an object a line. `.json`: a list of objects,
    or an object whose keys are files and whose values are captions or objects. `.parquet`: needs the package pyarrow.
    Spaces around the names of columns are dropped.

    Raises:
        UsageError: No such file, another format, or a row that is not of it.
    """
    reader = _READERS.get(Path(usable_path(str(path))).suffix.lower())
    if reader is None:
        raise UsageError(f"expected a table that ends in {', '.join(TABLE_SUFFIXES)}, got {path}")
    rows = [(place, {key.strip(): value for key, value in row.items()}) for place, row in reader(path)]
    columns = [*dict.fromkeys(column for _, row in rows for column in row)]
    return Table(path, columns, [(place, {c: row.get(c) for c in columns}) for place, row in rows])


def text_cell(value: Any) -> str:
    """The text of a cell, without space around it; empty if there is none.

    Raises:
        UsageError: It is something else than text, has control characters, or is a whole file's.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UsageError(f"expected text, got {shown(value)}")
    text = value.strip()
    if len(text) > _MOST_CHARACTERS:
        raise UsageError(
            f"a text of {len(text):,} characters, of which no text encoder reads more than {_MOST_CHARACTERS:,}; "
            "give each caption a row or line of its own"
        )
    readable_text(text.translate(_SPACES))
    return text


def file_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-8 with a byte order mark, which is dropped.

    Raises:
        UsageError: It cannot be read, or is in another encoding: which one, nothing in it tells.
    """
    content = file_bytes(path)
    with located(str(path)):
        return decoded(content)


def file_bytes(path: Path) -> bytes:
    """The content of a file; a UsageError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; check the path") from error


def decoded(content: bytes) -> str:
    """See `file_text`."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError("not UTF-8; save it in that encoding") from None


def column_of(role: str, names: Sequence[str], columns: Sequence[str], where: str) -> str | None:
    """The column that has one of the usual names of a role, in capitals or not; None if there is none.

    Raises:
        UsageError: Several have, or one has nearly.
    """
    found = [column for column in columns if column.casefold() in names]
    if len(found) > 1:
        raise UsageError(
            f"{where} has the columns {' and '.join(found)}, each of which could be the {role}: name one as "
            f"data.clips.columns.{role}, or leave the others out"
        )
    if not found:
        for column in columns:
            if hint := nearest(column.casefold(), names):
                raise UsageError(f"{where} has a column {column!r}, which is not read{hint}")
    return found[0] if found else None


# The formats: pairs of a row's place and its cells.

_LINE = "line {}"


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = file_text(path)
    header = text.split("\n", 1)[0]
    delimiter = next((sign for sign in _DELIMITERS if sign in header), ",")
    # Spaces before a quote would make it a part of the text, and the commas behind it ends of cells.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter, skipinitialspace=True)
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a long cell may be in a column of others
    try:
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise UsageError(
            f"{path}, line {reader.line_num}: not CSV ({error}); close quotes, and double those inside"
        ) from None
    finally:
        csv.field_size_limit(limit)
    if not lines:
        return
    columns = [column.strip() for column in lines[0][1]]
    if twice := [name for name in columns if name and columns.count(name) > 1]:
        raise UsageError(f"{path} has two columns {shown(twice[0])}; give each a name of its own")
    for line, cells in lines[1:]:
        if len(cells) != len(columns):
            raise UsageError(
                f"{path}, line {line}: {len(cells)} cells under a header of {len(columns)}; write a text that has a "
                f'{delimiter!r} in "double quotes"'
            )
        for cell in cells:
            if "\n" in cell and _holds_a_row(cell, delimiter, len(columns)):
                raise UsageError(
                    f"{path}, line {line}: a cell has the next rows in it, {shown(cell)}; close its quotes"
                )
        yield _LINE.format(line), dict(zip(columns, cells, strict=True))


def _holds_a_row(cell: str, delimiter: str, columns: int) -> bool:
    """Tell whether a later line of the cell names a file and has other cells, as after quotes that were not closed."""
    for line in cell.split("\n")[1:]:
        first, *others = line.split(delimiter)
        if columns > 1 and others and Path(first.strip(' "')).suffix.lower() in MEDIA_SUFFIXES:
            return True
    return False


def _json_line_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(file_text(path).split("\n"), 1):
        if line.strip():
            place = _LINE.format(number)
            with located(f"{path}, {place}"):
                yield place, _object(_parsed(line, "write one object a line"))


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with located(str(path)):
        content = _parsed(file_text(path), "see docs/data.md")
        if isinstance(content, dict):
            content = [_named(name, value) for name, value in content.items()]
        if not isinstance(content, list):
            raise UsageError(f"expected a list of objects, or an object by files, got {shown(content)}")
    for number, row in enumerate(content, 1):
        place = f"entry {number}"
        with located(f"{path}, {place}"):
            yield place, _object(row)


def _named(name: str, value: Any) -> dict[str, Any]:
    """The row of a file by what stands at its name."""
    if isinstance(value, str):
        return {"file_name": name, "caption": value}
    if not isinstance(value, dict):
        raise UsageError(f"expected a caption or an object for {shown(name)}, got {shown(value)}")
    return {"file_name": name, **value}


def _parsed(text: str, remedy: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key.strip() for key, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UsageError(f"an object has the key {shown(twice[0])} twice; leave one out")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise UsageError(f"nested too deeply; {remedy}") from None
    except UsageError:
        raise
    except ValueError as error:  # not JSON, or a number of thousands of digits
        raise UsageError(f"not JSON ({error}); {remedy}") from None


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UsageError(f"expected an object, got {shown(row)}")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UsageError(f"reading {path} needs a package: pip install 'chopgrad-align[datasets]'") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"cannot read {path}: {' '.join(str(error).split())[:300]}") from None
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


_READERS: Mapping[str, Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]] = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".jsonl": _json_line_rows,
    ".ndjson": _json_line_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}
TABLE_SUFFIXES = tuple(_READERS)

_DAMAGED = re.compile("�")
_NOT_A_TEXT = frozenset({"nan", "none", "null", "n/a", "<na>"})


def doubtful(text: str) -> str | None:
    """What is wrong with a caption that is one all the same, in words; None if nothing is."""
    if _DAMAGED.search(text):
        return "hold the sign U+FFFD, which stands for letters that were lost"
    if text.casefold() in _NOT_A_TEXT:
        return f"read {text!r}"
    return "have several lines" if "\n" in text else None

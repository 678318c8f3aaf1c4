"""Prompt files: what a pipeline is conditioned on, a row for each video."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError


@dataclass(frozen=True)
class Condition:
    """The inputs of one video: a prompt, a first image, or both. Never neither."""

    prompt: str = ""
    image: Path | None = None


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file that `read_conditions` reads; each row must have one.

    Raises:
        UsageError: as `read_conditions`, and for a row without a prompt.
    """
    conditions = read_conditions(path)
    if not all(condition.prompt for condition in conditions):
        raise UsageError(f"{path} has rows without a prompt; give every row a `prompt`")
    return [condition.prompt for condition in conditions]


def read_conditions(path: str | Path) -> list[Condition]:
    """Read what to make videos of.

    Args:
        path: One of, in UTF-8:
            `.txt`: a prompt a line; blank lines and lines that begin with `#` are skipped.
            `.csv` with a header, or `.jsonl`: columns (keys) `prompt` and `image`, or one of them; others are ignored.
            An image is a path, relative to the file; it must exist.

    Raises:
        UsageError: no such file, another format, no rows, or a row with nothing in it.
    """
    path = Path(path)
    readers = {".txt": _text_rows, ".csv": _csv_rows, ".jsonl": _json_rows}
    if path.suffix not in readers:
        raise UsageError(f"expected a prompt file that ends in {', '.join(readers)}, got {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark, as Excel writes it, is dropped
    except UnicodeDecodeError:
        raise UsageError(f"the prompt file {path} is not UTF-8; save it in that encoding") from None
    except OSError as error:
        raise UsageError(f"cannot read the prompt file {path}: {error.strerror}; check the path") from error
    conditions = [_condition(path, line, row) for line, row in readers[path.suffix](path, text)]
    if not conditions:
        raise UsageError(f"the prompt file {path} is empty; write at least one prompt into it")
    return conditions


def _condition(path: Path, line: int, row: dict) -> Condition:
    values = {key: row.get(key) or "" for key in ("prompt", "image")}
    for key, value in values.items():
        if not isinstance(value, str):
            raise UsageError(f"{path}, line {line}: expected text as `{key}`, got {value!r}")
    prompt, image = (value.strip() for value in values.values())
    if not (prompt or image):
        columns = ", ".join(map(str, row)) or "nothing"
        raise UsageError(f"{path}, line {line}: expected a `prompt` or an `image`, found neither (columns: {columns})")
    if image and not (path.parent / image).is_file():
        raise UsageError(f"{path}, line {line}: no image {path.parent / image}; paths are relative to the file")
    return Condition(prompt, path.parent / image if image else None)


# Each yields line numbers, from 1, and rows.


def _text_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, {"prompt": line}


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(text))
    for row in reader:
        if None in row:  # more cells than columns
            raise UsageError(f'{path}, line {reader.line_num}: write a prompt that has a comma in "double quotes"')
        yield reader.line_num, row


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}, line {number}: not JSON ({error}); write one object a line") from None
            if not isinstance(row, dict):
                raise UsageError(f"{path}, line {number}: expected an object with a `prompt`, got {line.strip()[:40]}")
            yield number, row

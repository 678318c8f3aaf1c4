"""Prompt files: what a pipeline is conditioned on, a row for each video."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..common.errors import UsageError


@dataclass(frozen=True)
class Condition:
    """The inputs of one video: a prompt, a first image, or both, never neither; and how much its rewards count."""

    prompt: str = ""
    image: Path | None = None
    weight: float = 1.0
    """Of all rewards."""
    weights: dict[str, float] = field(default_factory=dict)
    """Of single rewards, beside it, by the names that the config gives them; of the others 1."""

    def weight_of(self, reward: str) -> float:
        return self.weight * self.weights.get(reward, 1.0)


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
            An image is a path, relative to the file; it must exist. A column `weight` says how much the rewards of
            that row count (1 where it is empty), and `weight.NAME` how much the reward called NAME does.

    Raises:
        UsageError: no such file, another format, no rows, a row with nothing in it, or a weight that is no number.
    """
    path = Path(path)
    conditions = [_condition(path, line, row) for line, row in read_rows(path)]
    if not conditions:
        raise UsageError(f"the prompt file {path} is empty; write at least one prompt into it")
    return conditions


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Line numbers, from 1, and rows of a `.txt` (each a `prompt`), `.csv` or `.jsonl` file.

    Raises:
        UsageError: no such file, another format, or lines that are not of it.
    """
    readers = {".txt": _text_rows, ".csv": _csv_rows, ".jsonl": _json_rows}
    if path.suffix not in readers:
        raise UsageError(f"expected a prompt file that ends in {', '.join(readers)}, got {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark, as Excel writes it, is dropped
    except UnicodeDecodeError:
        raise UsageError(f"the prompt file {path} is not UTF-8; save it in that encoding") from None
    except OSError as error:
        raise UsageError(f"cannot read the prompt file {path}: {error.strerror}; check the path") from error
    return readers[path.suffix](path, text)


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
    weights = {
        key.removeprefix("weight").removeprefix("."): _weight(path, line, key, value)
        for key, value in row.items()
        if key == "weight" or key.startswith("weight.")
    }
    return Condition(prompt, path.parent / image if image else None, weights.pop("", 1.0), weights)


def _weight(path: Path, line: int, key: str, value: object) -> float:
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        weight = math.nan
    if not math.isfinite(weight):
        raise UsageError(f"{path}, line {line}: expected a finite number as `{key}`, got {value!r}")
    return weight


# The formats.


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

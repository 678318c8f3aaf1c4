"""Prompt files: what a pipeline is conditioned on, a row for each video."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..common.arguments import readable_text, shown, usable_path
from ..common.errors import UsageError, located

_MOST_CHARACTERS = 20_000  # of a prompt: several times what any text encoder reads


@dataclass(frozen=True)
class Condition:
    """The inputs of one video: a prompt, a first image, or both, never neither; and how much its rewards count."""

    prompt: str = ""
    image: Path | None = None
    weight: float = 1.0
    """Weight of all rewards."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights of single rewards, beside it, by the names that the config gives them; of the others 1."""
    negative_prompt: str | None = None
    """Prompt that guidance leads away from; None for the common one."""

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
            An image is a path, relative to the file; it must exist. A `negative_prompt` that is not empty takes the
            place of that of `model.call`. A column `weight` says how much the rewards of
            that row count (1 where it is empty), and `weight.NAME` how much the reward called NAME does.

    Raises:
        UsageError: no such file, another format, no rows, a row with nothing in it, a prompt that is a whole text or
            has control characters, or a weight that is no number.
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
    if Path(usable_path(str(path))).suffix not in readers:
        raise UsageError(f"expected a prompt file that ends in {', '.join(readers)}, got {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark, as Excel writes it, is dropped
    except UnicodeDecodeError:
        raise UsageError(f"the prompt file {path} is not UTF-8; save it in that encoding") from None
    except OSError as error:
        raise UsageError(f"cannot read the prompt file {path}: {error.strerror}; check the path") from error
    return readers[path.suffix](path, text)


def check_images(conditions: Iterable[Condition]) -> None:
    """Look at the head of each first image.

    Raises:
        UsageError: One is no picture.
    """
    from PIL import Image

    for path in {condition.image for condition in conditions if condition.image}:
        try:
            with Image.open(path):
                pass
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UsageError(
                f"cannot read the image {path} ({error}); give a picture, such as a png or a jpg"
            ) from error


def _condition(path: Path, line: int, row: dict) -> Condition:
    values = {key: row.get(key) or "" for key in ("prompt", "image", "negative_prompt")}
    for key, value in values.items():
        if not isinstance(value, str):
            raise UsageError(f"{path}, line {line}: expected text as `{key}`, got {value!r}")
    prompt, image, negative = (value.strip() for value in values.values())
    if not (prompt or image):
        columns = ", ".join(map(str, row))[:200] or "nothing"
        raise UsageError(f"{path}, line {line}: expected a `prompt` or an `image`, found neither (columns: {columns})")
    longest = max(len(prompt), len(negative))
    if longest > _MOST_CHARACTERS:
        raise UsageError(
            f"{path}, line {line}: a prompt of {longest:,} characters, of which no text encoder reads more than "
            f"{_MOST_CHARACTERS:,}; write one prompt a line"
        )
    with located(f"{path}, line {line}"):
        readable_text(f"{prompt} {negative}".translate(_SPACES))
        usable_path(image or "none")
    if image and not (path.parent / image).is_file():
        raise UsageError(f"{path}, line {line}: no image {path.parent / image}; paths are relative to the file")
    weights = {
        key.removeprefix("weight").removeprefix("."): _weight(path, line, key, value)
        for key, value in row.items()
        if key == "weight" or key.startswith("weight.")
    }
    return Condition(prompt, path.parent / image if image else None, weights.pop("", 1.0), weights, negative or None)


def _weight(path: Path, line: int, key: str, value: object) -> float:
    if value is None or value == "":
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not math.isfinite(weight):
        raise UsageError(f"{path}, line {line}: expected a finite number as `{key[:60]}`, got {shown(value)}")
    return weight


# The formats.

_SPACES = str.maketrans("\t\r\n", "   ")  # a cell may have several lines


def _text_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, {"prompt": line}


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a long cell may be in a column of others
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UsageError(
            f"{path}, line {reader.line_num}: not CSV ({error}); close quotes, and double those inside"
        ) from None
    finally:
        csv.field_size_limit(limit)
    columns = list(reader.fieldnames or [])
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise UsageError(f"{path} has two columns {shown(twice[0])}; give each a name of its own")
    for line, row in rows:
        if None in row:  # more cells than columns
            raise UsageError(f'{path}, line {line}: write a prompt that has a comma in "double quotes"')
        yield line, row


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except RecursionError:
                raise UsageError(f"{path}, line {number}: nested too deeply; write one object a line") from None
            except ValueError as error:  # not JSON, or a number of thousands of digits
                raise UsageError(f"{path}, line {number}: not JSON ({error}); write one object a line") from None
            if not isinstance(row, dict):
                raise UsageError(f"{path}, line {number}: expected an object with a `prompt`, got {line.strip()[:40]}")
            yield number, row

"""Prompt files: what a pipeline is conditioned on, a row for each video."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.arguments import shown, usable_path
from ..common.errors import UsageError, located
from .listing import describe
from .source import Source, is_still
from .table_file import CAPTION_NAMES, Table, column_of, file_text, read_table, text_cell
from .videofolder import list_folder


@dataclass(frozen=True)
class Condition:
    """The inputs of one video: a prompt, a first image, or anything else that a pipeline's call takes; never nothing.

    Attributes:
        prompt: May be empty beside something else.
        image: The first one.
        weight: Weight of all rewards.
        weights: Weights of single rewards, beside it, by the names that the config gives them; of the others 1.
        negative_prompt: Prompt that guidance leads away from; None for the common one.
        seed: Seed of its noise; None for another one each time.
        cells: Further columns that are not empty, as the file has them.
        place: File and line, for messages.
        folder: Paths in the cells are relative to it.
    """

    prompt: str = ""
    image: Path | None = None
    weight: float = 1.0
    weights: dict[str, float] = field(default_factory=dict)
    negative_prompt: str | None = None
    seed: int | None = None
    cells: dict[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)
    folder: Path = field(default=Path(), compare=False)

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that are not empty, under the names of the attributes where they are read here."""
        read = {
            "prompt": self.prompt or None,
            "image": None if self.image is None else str(self.image),
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
        }
        return {**self.cells, **{name: value for name, value in read.items() if value is not None}}

    def weight_of(self, reward: str) -> float:
        """How much a reward of this name counts."""
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
    """The conditions of `list_conditions`."""
    return list_conditions(path)[0]


def list_conditions(path: str | Path) -> tuple[list[Condition], str]:
    """Read what to make videos of.

    Args:
        path: One of:
            A `.txt`, in UTF-8: a prompt a line; blank lines and lines that begin with `#` are skipped.
            A table that `read_table` reads: columns (keys) `prompt` (or `caption`, or `text`), `image` (or
            `file_name`), or any other argument of the pipeline's call. Paths are relative to the file. A
            `negative_prompt` that is not empty takes the place of that of `model.call`, and a `seed` decides the noise.
            A column `weight` says how much the rewards of that row count (1 where it is empty), and `weight.NAME` how
            much the reward called NAME does.
            A folder of pictures, which are first images, with captions as `list_folder` finds them.

    Returns:
        The conditions, and a line that says how many there are.

    Raises:
        UsageError: no such file, another format, no rows, a row with nothing in it, a prompt that is a whole text or
            has control characters, no such image, or a weight or seed that is no number.
    """
    path = Path(usable_path(str(path)))
    if path.is_dir():
        listing = list_folder(path, pictures=True)
        conditions = [Condition(row.caption, _file(row.sources["target"]), place=row.name) for row in listing.rows]
        return conditions, listing.summary()
    table = _lines(path) if path.suffix.lower() == ".txt" else read_table(path)
    if not table.rows:
        raise UsageError(f"the prompt file {path} is empty; write at least one prompt into it")
    columns = {"prompt": "prompt", "image": "image"}
    if "prompt" not in table.columns:
        columns["prompt"] = column_of("prompt", CAPTION_NAMES, table.columns, str(path)) or "prompt"
    files = [row.get("file_name") for _, row in table.rows]
    if "image" not in table.columns and all(isinstance(name, str) and is_still(Path(name)) for name in files):
        columns["image"] = "file_name"
    conditions = []
    for place, row in table.rows:
        with located(table.named(place)):
            conditions.append(_condition(path.parent, table.named(place), row, columns))
    return conditions, describe([(condition.place, condition.prompt) for condition in conditions], "row", "prompt")


def _lines(path: Path) -> Table:
    rows = [
        (f"line {number}", {"prompt": line})
        for number, line in enumerate(file_text(path).split("\n"), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    return Table(path, ["prompt"], rows)


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


def _condition(folder: Path, place: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> Condition:
    cells = {key: value for key, value in row.items() if value not in (None, []) and str(value).strip()}
    texts = {}
    for role, column in {**columns, "negative_prompt": "negative_prompt"}.items():
        if role == "image" and isinstance(cells.get(column), list):
            continue  # several, for pipelines that take them
        with located(f"column {column!r}"):
            texts[role] = text_cell(cells.pop(column, None))
    image = texts.get("image")
    if image:
        image_file = folder / usable_path(image)
        if not image_file.is_file():
            raise UsageError(f"no image {image_file}; paths are relative to the file")
    weights = {
        key.removeprefix("weight").removeprefix("."): _number(key, cells.pop(key))
        for key in [*cells]
        if key == "weight" or key.startswith("weight.")
    }
    seed = cells.pop("seed", None)
    condition = Condition(
        texts["prompt"],
        image_file if image else None,
        weights.pop("", 1.0),
        weights,
        texts["negative_prompt"] or None,
        None if seed is None else _seed(seed),
        cells,
        place,
        folder,
    )
    if not (condition.prompt or condition.image or cells):
        there = ", ".join(map(str, row))[:200] or "nothing"
        raise UsageError(f"expected a `prompt` or an `image`, found neither (columns: {there})")
    return condition


def _file(source: Source) -> Path:
    if not isinstance(source, Path):
        raise UsageError("first images come as files; unpack the shard")
    return source


def _seed(value: Any) -> int:
    seed = _number("seed", value)
    if seed != int(seed) or not 0 <= seed < 2**63:
        raise UsageError(f"expected a whole number from 0 as `seed`, got {shown(value)}")
    return int(value)


def _number(key: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"expected a finite number as `{key[:60]}`, got {shown(value)}")
    return number

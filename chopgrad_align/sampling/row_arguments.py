"""Arguments of a pipeline's call that a row of data brings; what a column means follows from the call's signature."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..common.arguments import nearest, readable_text, shown
from ..common.errors import UsageError, located
from ..data.buckets import Bucket, crop_box, cut
from ..data.footage import Footage, open_footage
from ..data.source import BadFile
from ..data.table_file import text_cell

FRAMES = ("num_frames", "frames", "video_length")
"""Names that pipelines have for the number of frames."""

# What a run decides for each video by itself.
_RESERVED = re.compile(
    r"self|args|kwargs|generator|output_type|return_dict|num_(videos|images)_per_prompt|callback.*|.*_embeds(_.*)?"
    r"|(.*_)?latents|prompt_embeds_.*|.*attention_mask|.*_kwargs"
)
_FRAMEWISE = re.compile(r"mask|controls|.*(video|frames)")  # arguments with a picture for each frame
_OWN_SHAPE = ("face_video",)  # of another part of the picture than the video is
_NUMBERS = {"int", "float", "bool"}
_MEDIA = {"Image", "ndarray", "Tensor", "FloatTensor", "PipelineImageInput"}


@dataclass(frozen=True)
class Shape:
    """Frames, height and width that a call makes, as far as it is known."""

    frames: int | None = None
    height: int | None = None
    width: int | None = None


class Argument(Protocol):
    """An argument that a row brings."""

    @property
    def constant(self) -> bool:
        """False for pictures and videos."""

    @property
    def lead(self) -> Footage | None:
        """The picture or video whose shape that of the call should be like, if it has one."""

    def load(self, shape: Shape) -> Any:
        """Its value for a call of a shape."""


@dataclass(frozen=True)
class Value:
    """A text, a number, or a list of them."""

    value: Any
    constant: bool = True
    lead: None = None

    def load(self, shape: Shape) -> Any:
        return self.value


@dataclass(frozen=True)
class Picture:
    """A picture as its file has it, or the first frame of a video."""

    footage: Footage
    constant: bool = False

    @property
    def lead(self) -> Footage:
        """See `Argument`."""
        return self.footage

    def load(self, shape: Shape) -> Any:
        (frame,) = self.footage.frames_at([0.0])
        return _picture(frame)


@dataclass(frozen=True)
class Frames:
    """The frames of a video from its first, as many as the call makes, cut to the call's shape; a picture is repeated.

    Attributes:
        footage: A video, a folder of frames or a picture.
        own_shape: Not cut.
    """

    footage: Footage
    own_shape: bool = False
    constant: bool = False

    @property
    def lead(self) -> Footage | None:
        """See `Argument`."""
        return None if self.own_shape else self.footage

    def load(self, shape: Shape) -> Any:
        footage = self.footage
        there = shape.frames or 1 if footage.seconds == math.inf else max(int(footage.seconds * footage.fps + 0.05), 1)
        times = [i / footage.fps for i in range(min(there, shape.frames or there))]
        if shape.height is None or shape.width is None or self.own_shape:
            return [_picture(frame) for frame in footage.frames_at(times)]
        box = crop_box(Bucket(1, shape.height, shape.width), footage.height, footage.width, "center", (0.5, 0.5))
        return [_picture(cut(frame, box, shape.height, shape.width)) for frame in footage.frames_at(times)]


@dataclass(frozen=True)
class Several:
    """A list of arguments."""

    parts: tuple[Argument, ...]
    constant: bool = False

    @property
    def lead(self) -> Footage | None:
        """See `Argument`."""
        return self.parts[0].lead if self.parts else None

    def load(self, shape: Shape) -> Any:
        return [part.load(shape) for part in self.parts]


@dataclass(frozen=True)
class Record:
    """An object of a class of the pipeline's, such as a condition with its frame and strength."""

    cls: type
    fields: Mapping[str, Argument]
    constant: bool = False

    @property
    def lead(self) -> Footage | None:
        """See `Argument`."""
        return next((field.lead for field in self.fields.values() if field.lead is not None), None)

    def load(self, shape: Shape) -> Any:
        return self.cls(**{name: field.load(shape) for name, field in self.fields.items()})


def signature_of(pipe: Any) -> dict[str, inspect.Parameter]:
    """The arguments of a pipeline's call, in which it says the types, resolved."""
    call = inspect.unwrap(type(pipe).__call__)
    parameters = dict(inspect.signature(call).parameters)
    try:
        hints = typing.get_type_hints(call)
    except Exception:  # names that the pipeline's module does not have at run time
        return parameters
    return {
        name: parameter.replace(annotation=hints.get(name, parameter.annotation))
        for name, parameter in parameters.items()
    }


def frames_name(parameters: Collection[str]) -> str | None:
    """What a call names its number of frames; None if the frames that it is given decide."""
    return next((name for name in FRAMES if name in parameters), None)


def shape_arguments(parameters: Collection[str], bucket: Bucket) -> dict[str, int]:
    """The arguments of a call that say its shape, as far as it takes them."""
    frames = frames_name(parameters)
    given = {frames: bucket.frames} if frames else {}
    return given | {key: getattr(bucket, key) for key in ("height", "width") if key in parameters}


def shape_of(parameters: Mapping[str, inspect.Parameter], call: Mapping[str, Any]) -> Shape:
    """The shape of a call's video by its arguments and their defaults."""

    def size(name: str | None) -> int | None:
        if name is None or name not in parameters:
            return None
        value = call.get(name, parameters[name].default)
        return value if type(value) is int and value > 0 else None

    return Shape(size(frames_name(parameters)), size("height"), size("width"))


def columns_read(pipe: Any, columns: Iterable[str], ignored: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """The columns that are arguments of the pipeline's call, and those that are not.

    Raises:
        UsageError: One is nearly an argument, or is one that a row cannot bring.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    read: list[str] = []
    unread: list[str] = []
    for column in columns:
        if column in ignored:
            continue
        if column in parameters and _RESERVED.fullmatch(column):
            raise UsageError(f"a row cannot bring {column!r}, which a run makes for each video; leave the column out")
        hint = nearest(column, [name for name in (*parameters, "weight", "seed") if not _RESERVED.fullmatch(name)])
        if column not in parameters and hint:
            raise UsageError(
                f"{type(pipe).__name__} takes no argument {column!r}{hint} If not, add the column to data.ignore"
            )
        (read if column in parameters else unread).append(column)
    return read, unread


def read_argument(
    name: str, value: Any, annotation: Any, folder: Path, several: bool = False, repeat: bool = True
) -> Argument:
    """The argument that a cell holds.

    Args:
        name: Of the argument.
        value: Of the cell: text, as CSV has all of it, or what JSON has. Pictures and videos are paths, or lists of
            them; arrays are `.npy` files.
        annotation: Of the argument; it tells text, numbers and pictures apart.
        folder: Paths are relative to it.
        several: Whether the call takes a list of videos.
        repeat: Whether a picture stands for a video of it, where a video is expected; conditions have pictures too.

    Raises:
        UsageError: The cell holds something else.
    """
    words = _words(annotation)
    record = next((c for c in _classes(annotation) if isinstance(c, type) and dataclasses.is_dataclass(c)), None)
    with located(f"column {name!r}"):
        if record is not None:
            return _records(record, _from_json(value), folder)
        if words & _NUMBERS and not _is_array(value):
            return Value(_number(value, words))
        if words & _MEDIA or annotation is inspect.Parameter.empty:
            return _media(name, _from_json(value) if _is_list(value) else value, words, folder, several, repeat)
        return Value(text_cell(value) if "str" in words else _from_json(value))


def _words(annotation: Any) -> set[str]:
    return set(re.findall(r"[A-Za-z_]+", getattr(annotation, "__name__", "") + " " + str(annotation)))


def _classes(annotation: Any) -> Iterable[Any]:
    yield annotation
    for part in typing.get_args(annotation):
        yield from _classes(part)


def _is_array(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower().endswith(".npy")


def _is_list(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("[")


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise UsageError(f"expected a value as JSON writes it, got {shown(value)}") from None


def _number(value: Any, words: set[str]) -> Any:
    """A number of the kind that is asked for; a list, where that is asked for too."""
    number = _from_json(value.strip().lower() if isinstance(value, str) else value)
    if isinstance(number, list) and "list" in {word.lower() for word in words}:
        return number
    kinds: tuple[type, ...] = tuple({"int": int, "float": float, "bool": bool}[word] for word in words & _NUMBERS)
    if isinstance(number, bool) and bool not in kinds:
        raise UsageError(f"expected a number, got {shown(value)}")
    if isinstance(number, float) and float not in kinds and number.is_integer():
        number = int(number)  # tables of numbers with gaps hold 81 as 81.0
    fits = isinstance(number, int | float if float in kinds else kinds)
    if not fits or (isinstance(number, float) and not math.isfinite(number)):
        raise UsageError(f"expected {' or '.join(sorted(kind.__name__ for kind in kinds))}, got {shown(value)}")
    return number


def _records(cls: type, value: Any, folder: Path) -> Argument:
    if isinstance(value, list):
        return Several(tuple(_records(cls, part, folder) for part in value))
    if not isinstance(value, dict):
        raise UsageError(f"expected an object with keys of {cls.__name__}, or a list of them, got {shown(value)}")
    hints, names = typing.get_type_hints(cls), [field.name for field in dataclasses.fields(cls)]
    for key in value:
        if key not in names:
            raise UsageError(f"{cls.__name__} has no {key!r}{nearest(key, names)}; it has: {', '.join(names)}")
    return Record(cls, {key: read_argument(key, part, hints[key], folder, repeat=False) for key, part in value.items()})


def _media(name: str, value: Any, words: set[str], folder: Path, several: bool, repeat: bool) -> Argument:
    if isinstance(value, list):
        return Several(tuple(_media(name.removesuffix("s"), part, words, folder, False, repeat) for part in value))
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"expected a path, or a list of paths, got {shown(value)}")
    path = folder / readable_text(value.strip())
    if _is_array(value):
        return Value(_array(path, words), constant=False)
    try:
        footage = open_footage(path, str(path))
    except BadFile as bad:
        raise UsageError(f"bad file {bad}") from None
    still = footage.seconds == math.inf
    if "image" in name and not name.endswith("images"):
        return Picture(footage)
    if still and not (repeat and _FRAMEWISE.fullmatch(name)):
        return Several((Picture(footage),)) if name.endswith("images") else Picture(footage)
    frames = Frames(footage, own_shape=name in _OWN_SHAPE or "image" in name)
    return Several((frames,)) if several else frames


def _array(path: Path, words: set[str]) -> Any:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path} as an array ({error})") from None
    return array if "ndarray" in words else torch.from_numpy(array)


def _picture(frame: torch.Tensor) -> Any:
    from PIL import Image

    pixels = (frame.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())

"""Rows of prompts as arguments of one pipeline's call."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ..common.errors import UsageError, located
from ..data.buckets import Bucket, choose_bucket
from ..data.prompts import Condition
from ..data.source import BadFile
from ..sampling.row_arguments import (
    FRAMES,
    Argument,
    Shape,
    columns_read,
    read_argument,
    shape_arguments,
    shape_of,
    signature_of,
)

_SHAPE = (*FRAMES, "height", "width")


@dataclass(frozen=True)
class BoundCondition:
    """A condition, and the arguments that it brings beside its prompts.

    Attributes:
        condition: The row.
        constants: Texts, numbers and lists of them.
        media: Pictures, videos and arrays, which are read when they are asked for.
        bucket: The shape that is asked for; None for that of the call.
    """

    condition: Condition
    constants: Mapping[str, Any] = field(default_factory=dict)
    media: Mapping[str, Argument] = field(default_factory=dict)
    bucket: Bucket | None = None

    @property
    def shape(self) -> tuple[tuple[str, Any], ...]:
        """The constants that say its shape; equal for videos that stack."""
        return tuple((name, self.constants[name]) for name in _SHAPE if name in self.constants)

    @property
    def texts(self) -> dict[str, str]:
        """The constants that are text."""
        return {name: value for name, value in self.constants.items() if isinstance(value, str)}

    def inputs(self, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        """All that it brings to a call, with pictures and videos read.

        Args:
            pipe: A diffusers pipeline.
            call: The other arguments, which tell the shape where the row does not.

        Raises:
            UsageError: A file turns out to be damaged.
        """
        known = shape_of(signature_of(pipe), {**call, **self.constants})
        shape = known if self.bucket is None else Shape(self.bucket.frames, self.bucket.height, self.bucket.width)
        try:
            return {**self.constants, **{name: argument.load(shape) for name, argument in self.media.items()}}
        except BadFile as bad:
            raise UsageError(f"{self.condition.place}: bad file {bad}") from None


@dataclass(frozen=True)
class Binding:
    """What the rows of a file are for a pipeline.

    Attributes:
        rows: In the order of the file; with buckets a row without pictures is there once for each of them.
        arguments: The columns that are arguments.
        unread: Those that are not.
    """

    rows: list[BoundCondition]
    arguments: list[str]
    unread: list[str]


def bind(
    pipe: Any,
    conditions: Sequence[Condition],
    ignored: Collection[str] = (),
    buckets: Sequence[Bucket] = (),
) -> Binding:
    """Read the columns of conditions as arguments of a pipeline's call, and look at the files that they name.

    Args:
        pipe: A diffusers pipeline.
        conditions: The rows.
        ignored: Columns that are not read, whatever their names.
        buckets: Shapes of videos. A row gets the one that is nearest to its picture or video, or without one, all.

    Raises:
        UsageError: A column is nearly an argument; a cell holds what the argument is not; a file cannot be read.
    """
    parameters = signature_of(pipe)
    for role, asked in (("image", "images"), ("negative_prompt", "negative prompts")):
        if role not in parameters and any(getattr(condition, role) is not None for condition in conditions):
            raise UsageError(f"data: {type(pipe).__name__} takes no {asked}; leave the column out")
    columns = dict.fromkeys(column for condition in conditions for column in condition.cells)
    arguments, unread = columns_read(pipe, columns, ignored)
    several = "frame_index" in parameters  # one for each of several videos, which come as a list

    def read(condition: Condition) -> list[BoundCondition]:
        with located(condition.place):
            cells = {name: condition.cells[name] for name in arguments if name in condition.cells}
            if condition.image is not None:
                cells["image"] = str(condition.image.absolute())
            given = {
                name: read_argument(name, cell, parameters[name].annotation, condition.folder, several)
                for name, cell in cells.items()
            }
            if not (given or condition.prompt):
                raise UsageError(f"{type(pipe).__name__} takes nothing that is in it; give a `prompt`, or an argument")
        constants = {name: argument.load(Shape()) for name, argument in given.items() if argument.constant}
        media = {name: argument for name, argument in given.items() if not argument.constant}
        bound = BoundCondition(condition, constants, media)
        if not buckets or bound.shape:
            return [bound]
        return [
            BoundCondition(condition, {**constants, **shape_arguments(parameters, bucket)}, media, bucket)
            for bucket in _buckets_of(bound, buckets)
        ]

    with ThreadPoolExecutor() as pool:
        rows = [bound for of_row in pool.map(read, conditions) for bound in of_row]
    return Binding(rows, arguments, unread)


def _buckets_of(bound: BoundCondition, buckets: Sequence[Bucket]) -> Sequence[Bucket]:
    """The nearest bucket to the row's picture or video; all of them if it has none."""
    lead = next((argument.lead for argument in bound.media.values() if argument.lead is not None), None)
    if lead is None:
        return buckets
    longest = max(bucket.frames for bucket in buckets)
    there = longest if lead.seconds == math.inf else int(lead.seconds * lead.fps + 0.05)
    # Of a video that is shorter than all of them the pipeline tells whether it can go on from it.
    chosen = choose_bucket(buckets, there, lead.height, lead.width)
    return [chosen or choose_bucket(buckets, longest, lead.height, lead.width) or buckets[0]]


def check_stacks(rows: Sequence[BoundCondition]) -> None:
    """Raise a UsageError if rows of one shape cannot be in one call, which has many arguments once for all videos."""
    if any(row.media for row in rows):
        raise UsageError("pipelines take one image a call: set train.micro_batch=1 and validation.batch=1")
    for name in dict.fromkeys(name for row in rows for name in row.constants if name not in _SHAPE):
        values = [row.constants.get(name) for row in rows]
        texts = all(isinstance(value, str) for value in values)
        if not texts and any(value != values[0] for value in values):
            raise UsageError(
                f"the rows differ in {name!r}, which a call has once: set train.micro_batch=1 and validation.batch=1"
            )


def stacked(inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments of one call for several rows: texts as a list, and the rest of the first one, as all have it."""
    if len(inputs) == 1:
        return dict(inputs[0])
    return {
        name: [given[name] for given in inputs] if isinstance(value, str) else value
        for name, value in inputs[0].items()
    }

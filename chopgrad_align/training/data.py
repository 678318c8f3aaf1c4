"""The data that a config names, looked at before anything is loaded."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..common.arguments import nearest, whole_number
from ..common.errors import UsageError, located
from ..data.buckets import Bucket
from ..data.cache import Cache
from ..data.clips import Clips
from ..data.listing import Listing
from ..data.prompts import Condition, check_images, list_conditions
from ..data.source import Row
from ..objective.objective import Objective
from ..sampling.predictions.columns import expect_role
from ..sampling.predictions.latents import Encoder
from ..sampling.row_arguments import shape_arguments
from .batches import Batches, ClipBatches, PromptBatches
from .bound_conditions import Binding, BoundCondition, bind, check_stacks
from .config import Clips as ClipsConfig
from .config import Config
from .parallel import launched_as_main


class Data(Protocol):
    """Training and held-out data of a run."""

    def calls(self, pipe: Any, call: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The arguments of each kind of call that the data ask for, without pictures and videos.

        Raises:
            UsageError: The data bring what the pipeline does not take.
        """
        ...

    def batches(self, pipe: Any, objective: Objective, config: Config) -> Batches:
        """Micro-batches that the trainer reads."""
        ...

    def conditions(self, pairs: int, seeds: int) -> list[int]:
        """The condition of each held-out pair: equal for pairs of one prompt and image, or of one file of clips.

        Args:
            pairs: How many there are.
            seeds: How many of a condition come one after the other.
        """
        ...

    def groups(self, pairs: int, seeds: int) -> list[int]:
        """The same, equal for pairs that differ in the seed alone: two clips of a file do not."""
        ...


def read_data(config: Config) -> Data:
    """List what `config.data` names, and look at all files of clips.

    Raises:
        UsageError: There is no such data, they do not fit the rest of the config, or none of them can be used.
    """
    if config.data.cache is not None:
        _check_cache(Path(config.data.cache).absolute())
    return _clip_data(config, config.data.clips) if config.data.clips else _prompt_data(config)


def _check_cache(folder: Path) -> None:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"data.cache: cannot write to {there}; choose another folder")


@dataclass(frozen=True)
class PromptData:
    """Prompts, and whatever else the rows of their files bring.

    Attributes:
        training: To sample from.
        held_out: To measure with.
        config: Of the run.
    """

    training: list[Condition]
    held_out: list[Condition]
    config: Config
    _bound: dict[Any, tuple[Binding, Binding]] = field(default_factory=dict, compare=False, repr=False)

    def bound(self, pipe: Any) -> tuple[Binding, Binding]:
        """The rows of both files for a pipeline.

        Raises:
            UsageError: As `bind`, or rows that are not to be in one call.
        """
        if type(pipe) not in self._bound:
            settings, batch = self.config.data, self.config.validation.batch
            shapes = [Bucket(*shape) for shape in settings.buckets]
            both = [bind(pipe, of, settings.ignore, shapes) for of in (self.training, self.held_out)]
            if batch > 1 and len({row.shape for row in both[1].rows}) > 1:
                raise UsageError("data.held_out: videos of several shapes do not stack: set validation.batch=1")
            for key, binding in zip(("data.train", "data.held_out"), both, strict=True):
                if max(self.config.train.micro_batch, batch) > 1:
                    check_stacks(binding.rows)
                read, unread = binding.arguments, binding.unread
                if read or unread:
                    _say(
                        f"{key}: columns that are arguments of {type(pipe).__name__}: {', '.join(read) or 'none'}; "
                        f"columns that are not read: {', '.join(unread) or 'none'}"
                    )
            self._bound[type(pipe)] = both[0], both[1]
        return self._bound[type(pipe)]

    def calls(self, pipe: Any, call: Mapping[str, Any]) -> list[dict[str, Any]]:
        rows = [row for binding in self.bound(pipe) for row in binding.rows]
        return [*{repr(row.constants): {**call, **row.constants} for row in rows}.values()]

    def batches(self, pipe: Any, objective: Objective, config: Config) -> PromptBatches:
        size, seed, seeds = config.train.batch_size, config.run.seed, config.validation.seeds
        training, held_out = self.bound(pipe)
        return PromptBatches(
            pipe,
            objective,
            training.rows,
            _one_shape_each(held_out.rows),
            size,
            seed,
            seeds,
            captions=config.data.captions(),
            call=config.model.call,
            fixed_noise=config.train.seeds == "fixed",
            fps=config.model.fps,
        )

    def conditions(self, pairs: int, seeds: int) -> list[int]:
        each = [(c.prompt, c.image, repr(c.cells)) for c in self.held_out]
        return [each.index(each[i // seeds % len(each)]) for i in range(pairs)]

    def groups(self, pairs: int, seeds: int) -> list[int]:
        return self.conditions(pairs, seeds)


def _one_shape_each(rows: Sequence[BoundCondition]) -> list[BoundCondition]:
    """Each condition once: of several shapes another one in turn."""
    of_row: dict[int, list[BoundCondition]] = {}
    for row in rows:
        of_row.setdefault(id(row.condition), []).append(row)
    return [shapes[i % len(shapes)] for i, shapes in enumerate(of_row.values())]


def _prompt_data(config: Config) -> PromptData:
    read = {}
    for key, name in (("data.train", config.data.train), ("data.held_out", config.data.held_out)):
        with located(key):
            read[key], said = list_conditions(name)
        _say(f"{key}: {name}: {said}")
    data = PromptData(read["data.train"], read["data.held_out"], config)
    if Path(config.data.train).samefile(config.data.held_out):
        _say(f"data.held_out: {config.data.held_out} is data.train too; what is measured there is not held out")
    both = data.training + data.held_out
    for condition in both:
        for name in condition.weights:
            if name not in config.rewards:
                hint = nearest(name, config.rewards) or f"; there are {', '.join(config.rewards) or 'none'}"
                raise UsageError(f"data: no reward is called as in the column 'weight.{name}'{hint}")
    check_images(both)
    if max(config.train.micro_batch, config.validation.batch) > 1 and any(condition.image for condition in both):
        raise UsageError("pipelines take one image a call: set train.micro_batch=1 and validation.batch=1")
    return data


@dataclass(frozen=True)
class ClipData:
    """Clips with targets."""

    training: Clips
    held_out: Clips
    buckets: list[Bucket]

    def calls(self, pipe: Any, call: Mapping[str, Any]) -> list[dict[str, Any]]:
        parameters = inspect.signature(type(pipe).__call__).parameters
        return [{**call, **shape_arguments(parameters, bucket)} for bucket in self.buckets]

    def batches(self, pipe: Any, objective: Objective, config: Config) -> ClipBatches:
        caption = config.data.clips.caption if config.data.clips else None
        size, seed, seeds = config.train.batch_size, config.run.seed, config.validation.seeds
        return ClipBatches(
            pipe,
            self.training,
            self.held_out,
            size,
            seed,
            caption,
            seeds,
            captions=config.data.captions(),
            fixed_noise=config.train.seeds == "fixed",
        )

    def conditions(self, pairs: int, seeds: int) -> list[int]:
        return [i // seeds % len(self.held_out) for i in range(pairs)]

    def groups(self, pairs: int, seeds: int) -> list[int]:
        return [i // seeds for i in range(pairs)]


def _clip_data(config: Config, clips: ClipsConfig) -> ClipData:
    shapes = buckets(config, clips)
    if len(shapes) > 1 and config.validation.batch > 1:
        raise UsageError("clips of several buckets do not stack: set validation.batch=1")
    training = _rows("data.train", config.data.train, clips.split, clips)
    held_out = _rows("data.held_out", config.data.held_out, clips.held_out_split, clips)
    trained = {row.identity for row in training if row.identity is not None}
    if both := sum(row.identity in trained for row in held_out):
        _say(
            f"data.held_out: {both} of {len(held_out)} clips are training clips too; "
            "what is measured there is not held out"
        )
    data = ClipData(
        _clips(config.data.train, training, clips, shapes),
        _clips(config.data.held_out, held_out, clips, shapes),
        shapes,
    )
    _check_roles(config, config.data.train, data.training)
    _check_roles(config, config.data.held_out, data.held_out)
    return data


def _check_roles(config: Config, name: str, clips: Clips) -> None:
    """Raise a UsageError for a role that the config gives to the prediction and the clips do not have."""
    wanted = config.prediction.roles
    needs_target = [f"losses.{key}" for key in config.losses]
    needs_target += ["prediction.mode=denoise"] * (config.prediction.mode == "denoise")
    if not (wanted or needs_target):
        return
    roles = clips.clip(0).videos
    for key, role in wanted.items():
        expect_role(key, role, roles, name)
    if needs_target and "target" not in roles:
        raise UsageError(
            f"{needs_target[0]} compares with a target, and {name} has none: name its column as "
            f"data.clips.columns.target. It has: {', '.join(roles)}"
        )


def held_out_clips(config: Config) -> Clips:
    """The held-out clips alone; no file to train on is looked at.

    Raises:
        UsageError: As `read_data`, or the data are not clips.
    """
    clips = config.data.clips
    if clips is None:
        raise UsageError("expected a config whose data are clips (data.clips)")
    rows = _rows("data.held_out", config.data.held_out, clips.held_out_split, clips)
    return _clips(config.data.held_out, rows, clips, buckets(config, clips))


def clip_encoder(config: Config) -> Encoder:
    """The encoder of clips; it keeps those that come again, if the config has a folder for them."""
    clips = config.data.clips
    if config.data.cache is None or clips is None or clips.starts is None or clips.crop != "center":
        return Encoder()
    made = clips.degradation is not None or clips.mask is not None  # another time otherwise
    return Encoder(Cache(config.data.cache), frozenset({"target"} if made else {"target", "degraded"}))


def buckets(config: Config, clips: ClipsConfig) -> list[Bucket]:
    """The shapes that clips are cut to.

    Raises:
        UsageError: The config does not say.
    """
    call = config.model.call
    missing = [key for key in ("num_frames", "height", "width") if key not in call]
    if not clips.buckets and missing:
        raise UsageError(f"data.clips: their shape is not known: give data.clips.buckets, or model.call.{missing[0]}")
    if clips.buckets:
        return [Bucket(*shape) for shape in clips.buckets]
    return [Bucket(*(whole_number(f"model.call: {key}", call[key]) for key in ("num_frames", "height", "width")))]


def _clips(name: str, rows: Sequence[Row], config: ClipsConfig, buckets: list[Bucket]) -> Clips:
    from ..data.degradations import load_degradation, load_mask

    with located("data.clips.degradation"):
        degradation = None if config.degradation is None else load_degradation(config.degradation)
    with located("data.clips.mask"):
        mask = None if config.mask is None else load_mask(config.mask)
    clips = Clips(
        rows,
        buckets,
        stride=config.stride,
        fps=config.fps,
        starts=config.starts,
        crop=config.crop,
        degradation=degradation,
        mask=mask,
        on_bad_file=config.on_bad_file,
    )
    if clips.bad:
        _say(f"{name}: {clips.summary()}")
    return clips


def _rows(key: str, name: str, split: str, config: ClipsConfig) -> list[Row]:
    listing = _listed(name, split, config)
    _say(f"{key}: {name}: {listing.summary()}")
    return listing.rows


def _listed(name: str, split: str, config: ClipsConfig) -> Listing:
    from ..data.table import is_parquet_folder, is_saved_dataset, list_dataset
    from ..data.videofolder import list_folder

    if Path(name).exists() and not is_saved_dataset(name) and not is_parquet_folder(name):
        for key in ("split", "held_out_split"):
            if getattr(config, key) != getattr(ClipsConfig(), key):
                raise UsageError(
                    f"data.clips.{key} has no effect on the folder {name}, which has no splits: leave it out"
                )
        return list_folder(name, config.columns)
    return list_dataset(name, config.columns, split)


def _say(line: str) -> None:
    """Print a line about the data, once for all processes."""
    if launched_as_main():
        print(line)

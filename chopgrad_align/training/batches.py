"""Micro-batches from the data of a run: prompts, or clips with their targets."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from ..common.errors import UsageError
from ..data.clips import Clip, Clips
from ..data.order import batch_at, mix
from ..objective.objective import Objective
from ..sampling.row_arguments import shape_arguments
from .bound_conditions import BoundCondition, stacked
from .captions import Captions
from .methods.protocol import MicroBatch

Text = Mapping[str, str]
"""Arguments of a pipeline's call that are text: `prompt`, and others if they are not the same for all."""

_RATES = ("frame_rate", "fps")  # arguments of calls

_HELD_OUT = 1_000_000_000  # far from the seeds of training


def held_out_seed(place: int) -> int:
    """The seed of a held-out pair."""
    return _HELD_OUT + place


class Batches(Protocol):
    """The micro-batches of a run. Everything is a function of the seed, the step and the place in the batch."""

    def micro_batch(self, step: int, places: range) -> MicroBatch:
        """Some places of the batch of a step; on the CPU, so that any thread can read it."""
        ...

    def held_out(self, places: range) -> MicroBatch:
        """Some of the held-out pairs of condition and seed, on the pipeline's device."""
        ...

    def prompts(self, steps: int) -> list[str]:
        """Those of the first so many steps and of the held-out pairs, and perhaps others; each once."""
        ...

    def texts(self, steps: int) -> list[Text]:
        """Texts that the pipeline's call is told in their place; each once."""
        ...

    def kinds(self) -> list[MicroBatch]:
        """A batch of one video of each kind of call: those that bring other arguments, or other values of numbers."""
        ...


class PromptBatches:
    """Prompts and whatever else their rows bring, each once in every shuffled epoch.

    A batch is of one shape. If any condition has a negative prompt, those without one get the common one.

    Args:
        pipe: Whose call they are for.
        objective: Whose terms their weights are of.
        training: What to sample from.
        held_out: What to measure with; in turn, each time with another seed.
        batch_size: Over all processes.
        seed: Of the run.
        seeds: Held-out pairs of a condition that come one after the other.
        captions: What the model is told.
        call: Arguments of the call that are the same for all.
        fixed_noise: Whether a condition is always sampled from the same noise.
        fps: Frames a second of the videos, where a row does not bring them.
    """

    def __init__(
        self,
        pipe: Any,
        objective: Objective,
        training: Sequence[BoundCondition],
        held_out: Sequence[BoundCondition],
        batch_size: int,
        seed: int,
        seeds: int = 1,
        captions: Captions = Captions(),  # noqa: B008 (frozen)
        call: Mapping[str, Any] | None = None,
        fixed_noise: bool = False,
        fps: float | None = None,
    ) -> None:
        self._captions, self._call, self._fixed_noise, self._fps = captions, dict(call or {}), fixed_noise, fps
        self._has_negatives = any(row.condition.negative_prompt is not None for row in (*training, *held_out))
        self._pipe, self._terms, self._batch_size, self._seed = pipe, list(objective.terms), batch_size, seed
        self._training, self._held_out, self._seeds = training, held_out, seeds
        shapes = [row.shape for row in training]
        self._groups = [[i for i, s in enumerate(shapes) if s == shape] for shape in dict.fromkeys(shapes)]

    def micro_batch(self, step: int, places: range) -> MicroBatch:
        chosen = self._chosen(step)
        rows = [self._training[chosen[i]] for i in places]
        seeds = [_noise_seed(self._seed, step, i, chosen[i] if self._fixed_noise else None) for i in places]
        own = [seed if r.condition.seed is None else r.condition.seed for r, seed in zip(rows, seeds, strict=True)]
        told = [
            self._captions.drawn(row.condition.prompt, self._seed, step, i) for row, i in zip(rows, places, strict=True)
        ]
        made = self._made(rows, told, own, [mix(self._seed, step, i, 2) for i in places])
        return dataclasses.replace(made, steps_seed=_steps_seed(self._seed, step))

    def held_out(self, places: range) -> MicroBatch:
        rows, seeds = [], []
        for i in places:
            turn, place = divmod(i // self._seeds, len(self._held_out))
            rows.append(self._held_out[place])
            own = rows[-1].condition.seed
            seeds.append(held_out_seed(i) if own is None else own + turn * self._seeds + i % self._seeds)
        return self._made(rows, [self._captions.told(row.condition.prompt) for row in rows], seeds, seeds)

    def kinds(self) -> list[MicroBatch]:
        firsts: dict[Any, BoundCondition] = {}
        for row in (*self._held_out, *self._training):
            numbers = {name: value for name, value in row.constants.items() if name not in row.texts}
            firsts.setdefault(repr((numbers, [*row.texts], [*row.media])), row)
        return [self._made([row], [self._captions.told(row.condition.prompt)], [0], [0]) for row in firsts.values()]

    def prompts(self, steps: int) -> list[str]:
        return [*dict.fromkeys(row.condition.prompt for row in self._read(steps))]

    def texts(self, steps: int) -> list[Text]:
        texts = [
            {"prompt": told, **({"negative_prompt": self._negative(row)} if self._has_negatives else {}), **row.texts}
            for row in self._read(steps)
            for told in self._captions.all_told(row.condition.prompt)
        ]
        return [dict(pairs) for pairs in dict.fromkeys(tuple(text.items()) for text in texts)]

    def _chosen(self, step: int) -> list[int]:
        if len(self._groups) == 1:
            return _choose(len(self._training), self._batch_size, self._seed, step)
        return batch_at(step, self._batch_size, self._groups, self._seed)

    def _read(self, steps: int) -> list[BoundCondition]:
        if len(self._groups) > 1:
            read = dict.fromkeys(i for step in range(steps) for i in self._chosen(step))
        else:
            count = min(steps * self._batch_size, len(self._training))
            read = dict.fromkeys(_choose(len(self._training), count, self._seed, 0))
        return [*self._held_out, *(self._training[i] for i in read)]

    def _negative(self, row: BoundCondition) -> str:
        own = row.condition.negative_prompt
        return (self._call.get("negative_prompt") or "") if own is None else own

    def _made(
        self, rows: Sequence[BoundCondition], told: list[str], seeds: list[int], frame_seeds: list[int]
    ) -> MicroBatch:
        inputs = call_inputs(self._pipe, told, seeds)
        if self._has_negatives:
            inputs["negative_prompt"] = _one_or_all([self._negative(row) for row in rows])
        inputs |= stacked([row.inputs(self._pipe, self._call) for row in rows])
        weights = {name: [row.condition.weight_of(name) for row in rows] for name in self._terms}
        return MicroBatch(
            inputs,
            [row.condition.prompt for row in rows],
            frame_seeds,
            weights,
            seeds,
            fps=[next((row.constants[name] for name in _RATES if name in row.constants), self._fps) for row in rows],
            rows=[row.condition.columns for row in rows],
        )


class ClipBatches:
    """Clips with their captions, targets and conditions; all clips of a batch are of one shape.

    Args:
        pipe: Whose call they are for.
        training: What to train on.
        held_out: What to measure with; in turn, each time another clip of the file.
        batch_size: Over all processes.
        seed: Of the run.
        caption: Instead of each clip's own.
        seeds: Held-out pairs of a clip that come one after the other.
        captions: What the model is told.
        fixed_noise: Whether a row of the data is always sampled from the same noise.
    """

    def __init__(
        self,
        pipe: Any,
        training: Clips,
        held_out: Clips,
        batch_size: int,
        seed: int,
        caption: str | None = None,
        seeds: int = 1,
        captions: Captions = Captions(),  # noqa: B008 (frozen)
        fixed_noise: bool = False,
    ) -> None:
        self._seeds, self._told, self._fixed_noise = seeds, captions, fixed_noise
        self._pipe, self._batch_size, self._seed, self._caption = pipe, batch_size, seed, caption
        self._training, self._held_out, self._captions = training, held_out, training.captions

    def micro_batch(self, step: int, places: range) -> MicroBatch:
        chosen = self._training.batch(step, self._batch_size, self._seed)
        clips = [self._clip(chosen[i], step, i) for i in places]
        told = [self._told.drawn(self._text(clip), self._seed, step, i) for clip, i in zip(clips, places, strict=True)]
        made = self._made(
            clips,
            told,
            [_noise_seed(self._seed, step, i, chosen[i] if self._fixed_noise else None) for i in places],
        )
        return dataclasses.replace(made, steps_seed=_steps_seed(self._seed, step))

    def held_out(self, places: range) -> MicroBatch:
        clips = [held_out_clip(self._held_out, i // self._seeds) for i in places]
        told = [self._told.told(self._text(clip)) for clip in clips]
        return on_device(self._made(clips, told, [held_out_seed(i) for i in places]), self._pipe.device)

    def kinds(self) -> list[MicroBatch]:
        return [self.held_out(range(1))]

    def texts(self, steps: int) -> list[Text]:
        told = (text for prompt in self.prompts(steps) for text in self._told.all_told(prompt))
        return [{"prompt": text} for text in dict.fromkeys(told)]

    def prompts(self, steps: int) -> list[str]:
        if self._caption is not None:
            return [self._caption]
        read: set[int] = set()
        for step in range(steps):
            if len(read) == len(self._captions):
                break
            read.update(self._training.batch(step, self._batch_size, self._seed))
        return [*dict.fromkeys((*self._held_out.captions, *(self._captions[i] for i in sorted(read))))]

    def _clip(self, index: int, step: int, place: int) -> Clip:
        """A clip of a row; if its file turns out to be damaged, of a row that was chosen before, or in the same step.

        Any row's would do, but that its caption may not be among the prompts of the steps.
        """
        clip = self._training.clip(index, self._seed, step, place)
        if self._caption is not None or clip.caption == self._captions[index]:
            return clip
        shape = clip.bucket
        for earlier in range(step, -1, -1):
            for row in self._training.batch(earlier, self._batch_size, self._seed):
                other = self._training.clip(row, self._seed, step, place)
                if other.caption == self._captions[row] and other.bucket == shape:
                    return other
        raise UsageError(f"data.train: no clip up to step {step + 1} can be read: {self._training.summary()}")

    def _text(self, clip: Clip) -> str:
        return clip.caption if self._caption is None else self._caption

    def _made(self, clips: Sequence[Clip], told: list[str], seeds: list[int]) -> MicroBatch:
        made = _stacked(self._pipe, clips, told, seeds)
        return dataclasses.replace(made, prompts=[self._text(clip) for clip in clips])


def held_out_clip(clips: Clips, place: int) -> Clip:
    """The clip of a held-out pair: the files in turn, each time another clip."""
    return clips.clip(place % len(clips), _HELD_OUT, 0, place)


def clip_batch(pipe: Any, clips: Sequence[Clip], captions: list[str], seeds: list[int]) -> MicroBatch:
    """Clips of one shape, for one call of the pipeline of that shape; on its device."""
    return on_device(_stacked(pipe, clips, captions, seeds), pipe.device)


def _stacked(pipe: Any, clips: Sequence[Clip], captions: list[str], seeds: list[int]) -> MicroBatch:
    videos = {role: torch.stack([clip.videos[role] for clip in clips]) for role in clips[0].videos}
    shape = shape_arguments(inspect.signature(type(pipe).__call__).parameters, clips[0].bucket)
    return MicroBatch(
        call_inputs(pipe, captions, seeds) | shape,
        captions,
        frame_seeds=seeds,
        seeds=seeds,
        videos=videos,
        fps=[clip.fps for clip in clips],
        rows=[{"name": clip.name, "caption": clip.caption} for clip in clips],
    )


def on_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The same, with its clips on a device."""
    return dataclasses.replace(batch, videos={role: video.to(device) for role, video in batch.videos.items()})


def call_inputs(pipe: Any, prompts: list[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Arguments of the pipeline's call for these videos: a generator each, and the prompts if it takes any."""
    inputs: dict[str, Any] = {"generator": _one_or_all([torch.Generator().manual_seed(seed) for seed in seeds])}
    if "prompt" in inspect.signature(type(pipe).__call__).parameters:
        inputs["prompt"] = _one_or_all(prompts)
    return inputs


def _one_or_all(values: list[Any]) -> Any:
    """Not a list if it is one: some pipelines take none."""
    return values if len(values) > 1 else values[0]


def _noise_seed(seed: int, step: int, place: int, row: int | None) -> int:
    """The seed of a video's noise: of its own, or always that of its row of the data."""
    return mix(seed, step, place, 1) if row is None else mix(seed, row, 5)


def _steps_seed(seed: int, step: int) -> int:
    """The seed of what a sampling policy draws for a step: the same for all of its batch, whoever works on it."""
    return mix(seed, step, 0, 3)


def _choose(count: int, batch: int, seed: int, step: int) -> list[int]:
    """Which conditions the batch of a step has: shuffled epochs, each condition once in each."""
    order: list[int] = []
    epoch, start = divmod(step * batch, count)
    while len(order) < start + batch:
        order += torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, epoch))).tolist()
        epoch += 1
    return order[start : start + batch]

"""Micro-batches from the data of a run: prompts, or clips with their targets."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ..common.errors import UsageError
from ..data.clips import Clip, Clips
from ..data.order import mix
from ..data.prompts import Condition
from ..objective.objective import Objective
from .methods.protocol import MicroBatch

_HELD_OUT = 1_000_000_000  # far from the seeds of training


def held_out_seed(place: int) -> int:
    """The seed of a held-out pair."""
    return _HELD_OUT + place


class Batches(Protocol):
    """What the trainer reads. Everything is a function of the seed, the step and the place in the batch."""

    def micro_batch(self, step: int, places: range) -> MicroBatch:
        """Some places of the batch of a step; on the CPU, so that any thread can read it."""
        ...

    def held_out(self, places: range) -> MicroBatch:
        """Some of the held-out pairs of condition and seed, on the pipeline's device."""
        ...

    def prompts(self, steps: int) -> list[str]:
        """Those of the first so many steps and of the held-out pairs, and perhaps others; each once."""
        ...


class PromptBatches:
    """Prompts and images, each once in every shuffled epoch.

    Args:
        pipe: Whose call they are for.
        objective: Whose terms their weights are of.
        training: What to sample from.
        held_out: What to measure with; in turn, each time with another seed.
        batch_size: Over all processes.
        seed: Of the run.
        seeds: Held-out pairs of a condition that come one after the other.
    """

    def __init__(
        self,
        pipe: Any,
        objective: Objective,
        training: Sequence[Condition],
        held_out: Sequence[Condition],
        batch_size: int,
        seed: int,
        seeds: int = 1,
    ) -> None:
        self._pipe, self._terms, self._batch_size, self._seed = pipe, list(objective.terms), batch_size, seed
        self._training, self._held_out, self._seeds = training, held_out, seeds

    def micro_batch(self, step: int, places: range) -> MicroBatch:
        chosen = _choose(len(self._training), self._batch_size, self._seed, step)
        conditions = [self._training[chosen[i]] for i in places]
        seeds = [mix(self._seed, step, i, 1) for i in places]
        made = self._made(conditions, seeds, [mix(self._seed, step, i, 2) for i in places])
        return dataclasses.replace(made, steps_seed=_steps_seed(self._seed, step))

    def held_out(self, places: range) -> MicroBatch:
        seeds = [held_out_seed(i) for i in places]
        return self._made([self._held_out[i // self._seeds % len(self._held_out)] for i in places], seeds, seeds)

    def prompts(self, steps: int) -> list[str]:
        read = min(steps * self._batch_size, len(self._training))
        training = [self._training[i] for i in _choose(len(self._training), read, self._seed, 0)]
        return [*dict.fromkeys(condition.prompt for condition in (*self._held_out, *training))]

    def _made(self, conditions: Sequence[Condition], seeds: list[int], frame_seeds: list[int]) -> MicroBatch:
        from diffusers.utils import load_image

        prompts = [condition.prompt for condition in conditions]
        inputs = call_inputs(self._pipe, prompts, seeds)
        images = [load_image(str(condition.image)) for condition in conditions if condition.image is not None]
        if images:
            inputs["image"] = images[0] if len(images) == 1 else images
        weights = {name: [condition.weight_of(name) for condition in conditions] for name in self._terms}
        return MicroBatch(inputs, prompts, frame_seeds, weights, seeds)


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
    ) -> None:
        self._seeds = seeds
        self._pipe, self._batch_size, self._seed, self._caption = pipe, batch_size, seed, caption
        self._training, self._held_out, self._captions = training, held_out, training.captions

    def micro_batch(self, step: int, places: range) -> MicroBatch:
        chosen = self._training.batch(step, self._batch_size, self._seed)
        clips = [self._clip(chosen[i], step, i) for i in places]
        made = self._made(clips, [mix(self._seed, step, i, 1) for i in places])
        return dataclasses.replace(made, steps_seed=_steps_seed(self._seed, step))

    def held_out(self, places: range) -> MicroBatch:
        clips = [held_out_clip(self._held_out, i // self._seeds) for i in places]
        return on_device(self._made(clips, [held_out_seed(i) for i in places]), self._pipe.device)

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
        shape = clip.videos["target"].shape
        for earlier in range(step, -1, -1):
            for row in self._training.batch(earlier, self._batch_size, self._seed):
                other = self._training.clip(row, self._seed, step, place)
                if other.caption == self._captions[row] and other.videos["target"].shape == shape:
                    return other
        raise UsageError(f"data.train: no clip up to step {step + 1} can be read: {self._training.summary()}")

    def _text(self, clip: Clip) -> str:
        return clip.caption if self._caption is None else self._caption

    def _made(self, clips: Sequence[Clip], seeds: list[int]) -> MicroBatch:
        return _stacked(self._pipe, clips, [self._text(clip) for clip in clips], seeds)


def held_out_clip(clips: Clips, place: int) -> Clip:
    """The clip of a held-out pair: the files in turn, each time another clip."""
    return clips.clip(place % len(clips), _HELD_OUT, 0, place)


def clip_batch(pipe: Any, clips: Sequence[Clip], captions: list[str], seeds: list[int]) -> MicroBatch:
    """Clips of one shape, for one call of the pipeline of that shape; on its device."""
    return on_device(_stacked(pipe, clips, captions, seeds), pipe.device)


def _stacked(pipe: Any, clips: Sequence[Clip], captions: list[str], seeds: list[int]) -> MicroBatch:
    videos = {role: torch.stack([clip.videos[role] for clip in clips]) for role in clips[0].videos}
    frames, _, height, width = clips[0].videos["target"].shape
    shape = {"num_frames": frames, "height": height, "width": width}
    return MicroBatch(
        call_inputs(pipe, captions, seeds) | shape, captions, frame_seeds=seeds, seeds=seeds, videos=videos
    )


def on_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The same, with its clips on a device."""
    return dataclasses.replace(batch, videos={role: video.to(device) for role, video in batch.videos.items()})


def call_inputs(pipe: Any, prompts: list[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Arguments of the pipeline's call for these videos: a generator each, and the prompts if it takes any."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # Not in lists if it is one: some pipelines take none.
    inputs: dict[str, Any] = {"generator": generators if len(generators) > 1 else generators[0]}
    if "prompt" in inspect.signature(type(pipe).__call__).parameters:
        inputs["prompt"] = prompts if len(prompts) > 1 else prompts[0]
    return inputs


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

"""Reward gradients: videos are sampled with a gradient, scored, and the gradient is backpropagated to the weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...data.order import mix
from ...decoding.backprop import Backprop
from ...decoding.selected_frames import decode_selected_frames
from ...objective.objective import Objective
from ...objective.statistics import Statistics
from ...objective.terms import Reference
from ...sampling.call_shape import frames_asked
from ...sampling.checkpointing import Checkpointing
from ...sampling.outputs import sound_rate
from ...sampling.predictions import Prediction, Sample
from ...sampling.randomness import seeded_state
from ...sampling.rollout import RolloutPart, rollout_parts
from ...sampling.steps import StepPolicy
from ..known_samples import known_samples
from .base_distance import BaseDistance
from .protocol import MicroBatch
from .streaming import StreamedLosses, can_stream


@dataclass(frozen=True)
class DirectGradient:
    """Backpropagation of the objective through decoder and sampler.

    Attributes:
        call: Arguments of the pipeline's call.
        steps: Denoising steps that carry gradient.
        backprop: How to backpropagate through the decoder.
        batch_size: Videos for one optimizer step, over all processes; the loss is their mean.
        phases: A context for each named part, for what measures them.
        checkpointing: What is kept of the denoiser's calls until the backward pass.
        decode: How to decode; `decode_selected_frames` with all its arguments.
        prediction: How the pipeline's call predicts a video.
        base: Context in which the denoiser is the untrained one.
    """

    pipe: Any
    call: Mapping[str, Any]
    objective: Objective
    steps: StepPolicy
    backprop: Backprop
    batch_size: int
    phases: Callable[[str], AbstractContextManager[None]]
    checkpointing: Checkpointing = Checkpointing()  # noqa: RUF009 (frozen)
    decode: Callable[..., Tensor] = decode_selected_frames
    prediction: Prediction = field(default_factory=Sample)
    base: Callable[[], AbstractContextManager[None]] = nullcontext

    def accumulate(self, batch: MicroBatch, statistics: Mapping[str, Statistics]) -> Tensor:
        """See `Method`."""
        # Beside the scheduler's noise, which is of each video, what a decoder injects and the masks of dropout.
        with seeded_state(mix(batch.steps_seed, *batch.seeds), self.pipe.device):
            return self._accumulate(batch, statistics)

    def _accumulate(self, batch: MicroBatch, statistics: Mapping[str, Statistics]) -> Tensor:
        call = {**self.call, **batch.inputs}
        read = functools.partial(self.objective.frames_read, seeds=batch.frame_seeds)
        expected = frames_asked(call) or (batch.videos["target"].shape[1] if "target" in batch.videos else None)
        whole = functools.partial(self.decode, read=read, expected=expected)
        streams = "target" in batch.videos and can_stream(self.objective, self.backprop)
        streamed: StreamedLosses | None = None

        def decode(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal streamed
            with self.phases("decoding"):
                if not streams:
                    return whole(*args, **kwargs)
                target, mask = batch.videos["target"], batch.videos.get("mask")
                streamed = StreamedLosses(self.objective, target, mask, batch.weights)
                return streamed.decode(whole, *args, **kwargs)

        distance = BaseDistance(self.base, len(batch.prompts))
        latents = self.objective.reads_latents
        with self.prediction.prepare(self.pipe, batch.videos, batch.seeds, True, latents) as prepared:
            made = rollout_parts(
                self.pipe,
                {**call, **prepared.inputs},
                self.steps,
                self.backprop,
                checkpointing=self.checkpointing,
                decode=decode,
                output_type="pt" if self.objective.reads_pixels else "latent",
                steps_seed=batch.steps_seed,
                observe=distance.observe if self.objective.reads_base else None,
                audio=self.objective.reads_audio,
            )
            rows, rest = [], 1
            while rest:
                with self.phases("sampling"):
                    part = next(made)
                reference = replace(prepared.reference(), base_distance=distance.take())
                if self.objective.reads_sample:
                    sound = () if part.audio is None else part.audio
                    known = known_samples(batch, self.pipe.device, [*sound], sound_rate(self.pipe))
                    reference = replace(reference, sample=known)
                rows.append(part.share * self._backward(part, batch, reference, streamed, statistics))
                rest = part.rest
                del part  # its video, before the next one is made
        return torch.stack(rows).sum(0)

    def _backward(
        self,
        part: RolloutPart,
        batch: MicroBatch,
        reference: Reference,
        streamed: StreamedLosses | None,
        statistics: Mapping[str, Statistics],
    ) -> Tensor:
        """Score clips and take the gradient, before the next ones are made; returns rows as `accumulate` does."""
        with self.phases("reward"):
            known = {} if streamed is None else streamed.scores
            scores = self.objective.scores(part.video, batch.prompts, batch.frame_seeds, reference, known)
            values = self.objective.values(scores, batch.weights, statistics)
            total = torch.stack([*values.values()]).sum(0)
        with self.phases("backward"):
            # The streamed losses are part of the total's value, but not of its graph.
            whole_batch = total.sum() if streamed is None else total.sum() + streamed.value
            (-part.share * whole_batch / self.batch_size).backward()
        columns = [total, *scores.values(), *values.values()]
        return torch.stack([column.detach().float() for column in columns], 1)

"""Predict by one call of the denoiser, from the noised target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ...common.errors import UsageError
from ...objective.terms import Reference
from .columns import arguments
from .latents import Encoder
from .one_call import one_call
from .probability_paths import path_of
from .protocol import PreparedCall, Videos


@dataclass(frozen=True)
class Denoise:
    """Denoising of the target from a random time, as in training a diffusion model.

    A loss on the decoded prediction stands beside the usual one, `diffusion`. One time is drawn for each call, that is
    for each micro-batch; measurements take the middle of the range. What a run measures is so the model's skill at
    seeing through noise in the target; as a method of restoration, which has no target, this is not defined.

    Args:
        times: In (0, 1]: lowest and highest time of the schedule, drawn uniformly between them.
        columns: Conditions, as for `Sample`.
        encoder: Makes latents of clips.
    """

    times: tuple[float, float] = (0.02, 0.98)
    columns: Mapping[str, str] = field(default_factory=dict)
    encoder: Encoder = field(default_factory=Encoder)

    @contextmanager
    def prepare(
        self, pipe: Any, videos: Videos, seeds: Sequence[int], training: bool, latents: bool
    ) -> Iterator[PreparedCall]:
        """See `Prediction.prepare`."""
        if "target" not in videos:
            raise UsageError("prediction.mode=denoise needs data with a target: give a section data.clips")
        low, high = self.times
        drawn = torch.rand((), generator=torch.Generator().manual_seed(seeds[0])).item() if training else 0.5
        time, path = low + (high - low) * drawn, path_of(pipe.scheduler)
        clean = self.encoder(pipe, videos, "target")
        noise = torch.stack(
            [torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        ).to(clean)
        with one_call(pipe, path, time) as call:
            inputs = {"latents": path.noised(clean, noise, time), **call.inputs, **arguments(self.columns, videos)}

            def reference() -> Reference:
                if getattr(pipe, "do_classifier_free_guidance", False):
                    raise UsageError(
                        "prediction.mode=denoise: a guided model returns a mixture of two outputs, which is not what "
                        "it was trained to return; set model.call.guidance_scale=1"
                    )
                return call.reference(videos, clean, path.output(clean, noise, time))

            yield PreparedCall(inputs, reference)

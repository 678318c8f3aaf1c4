"""Predict by one call of the denoiser, from the degraded clip."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .columns import arguments, expect_role
from .latents import Encoder, continued, frame_axis
from .one_call import one_call
from .probability_paths import path_of
from .protocol import PreparedCall, Videos


@dataclass(frozen=True)
class OneStep:
    """A single denoising step from the degraded clip's latents, which are taken for noisy ones of a fixed time.

    So a text-to-video model becomes a restorer that costs one call: the recipe of one-step video super-resolution, such
    as DOVE (arXiv 2505.16239).

    Args:
        time: In (0, 1]: of the schedule; where the model believes to be. In flow matching it is the noise's share.
        source: The role of the data that it starts from.
        columns: Further conditions, as for `Sample`.
        encoder: Makes latents of clips.
    """

    time: float = 0.4
    source: str = "degraded"
    columns: Mapping[str, str] = field(default_factory=dict)
    encoder: Encoder = field(default_factory=Encoder)

    @contextmanager
    def prepare(
        self, pipe: Any, videos: Videos, seeds: Sequence[int], training: bool, latents: bool
    ) -> Iterator[PreparedCall]:
        """See `Prediction.prepare`."""
        expect_role("source", self.source, videos)
        start = self.encoder(pipe, videos, self.source)
        known = self.encoder(pipe, videos, "context") if "context" in videos else None
        if known is not None:
            start = continued(known, start, frame_axis(pipe))
        true = self.encoder(pipe, videos, "target") if latents else None
        path = path_of(pipe.scheduler)
        with one_call(pipe, path, self.time, known) as call:
            inputs = {"latents": start, **call.inputs, **arguments(self.columns, videos)}
            yield PreparedCall(inputs, lambda: call.reference(videos, true, None))

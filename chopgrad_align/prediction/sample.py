"""Predict by the pipeline's whole sampler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..objective import Reference
from .columns import arguments
from .protocol import Begun, Videos


@dataclass(frozen=True)
class Sample:
    """From noise, by the pipeline's own sampler; the gradient reaches its last steps.

    Args:
        columns: Which argument of the pipeline's call is which role of the data; see `arguments`.
    """

    columns: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def begin(self, pipe: Any, videos: Videos, seeds: Sequence[int], training: bool, latents: bool) -> Iterator[Begun]:
        """As `Prediction.begin`."""
        reference = Reference(videos.get("target"), videos.get("mask"))
        yield Begun(arguments(self.columns, videos), lambda: reference)

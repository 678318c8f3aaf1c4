"""What a prediction is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ...objective.terms import Reference

Videos = Mapping[str, Tensor]
"""A batch of clips: `(B, F, C, H, W)` in [0, 1] for each role of the data (`target`, `degraded`, `mask`, …).

The role `context` is the beginning of the clip where it is known: of a window of a long video."""


@dataclass(frozen=True)
class Begun:
    """A prediction that only the pipeline's call is missing of.

    Attributes:
        inputs: Arguments of that call, which come before those of the config.
        reference: To be asked after the call: what the prediction is compared with.
    """

    inputs: Mapping[str, Any]
    reference: Callable[[], Reference]


class Prediction(Protocol):
    """A small frozen object that says how a pipeline's call predicts a clip."""

    @property
    def columns(self) -> Mapping[str, str]:
        """Conditions: which argument of the pipeline's call is which role of the data; see `columns.arguments`."""
        ...

    def begin(
        self, pipe: Any, videos: Videos, seeds: Sequence[int], training: bool, latents: bool
    ) -> AbstractContextManager[Begun]:
        """Prepare the pipeline for one call; it is as before on exit.

        Args:
            pipe: Of diffusers.
            videos: On the pipeline's device; empty for data without clips.
            seeds: One a sample, of everything that is drawn.
            training: False for measurements, which draw no time.
            latents: Whether the objective reads the true latents.

        Raises:
            UsageError: The data lacks what it needs, or the pipeline is of a kind that it does not know.
        """
        ...

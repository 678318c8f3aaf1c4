"""The contract of a prediction."""

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
class PreparedCall:
    """Everything of a prediction but the pipeline's call.

    Attributes:
        inputs: Arguments of that call, which take precedence over those of the config.
        reference: Returns, after the call, the reference that the prediction is compared with.
    """

    inputs: Mapping[str, Any]
    reference: Callable[[], Reference]


class Prediction(Protocol):
    """The way in which a pipeline's call predicts a clip: a small frozen object."""

    @property
    def columns(self) -> Mapping[str, str]:
        """Conditions: which argument of the pipeline's call is which role of the data; see `columns.arguments`."""
        ...

    def prepare(
        self, pipe: Any, videos: Videos, seeds: Sequence[int], training: bool, latents: bool
    ) -> AbstractContextManager[PreparedCall]:
        """Prepare the pipeline for one call; it is as before on exit.

        Args:
            pipe: A diffusers pipeline.
            videos: On the pipeline's device; empty for data without clips.
            seeds: One for each sample; they decide everything that is drawn.
            training: False for measurements, which draw no time.
            latents: Whether the objective reads the true latents.

        Raises:
            UsageError: The data lacks what it needs, or the pipeline is of a kind that it does not know.
        """
        ...

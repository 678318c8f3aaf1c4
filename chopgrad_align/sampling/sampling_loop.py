"""Position in a pipeline's sampling loop, which is told by the calls of its scheduler."""

from __future__ import annotations

import math
from typing import Any

from ..common.errors import UsageError


class SamplingLoop:
    """Count of the scheduler's calls in one call of a pipeline.

    Attributes:
        scheduler: The pipeline's own; copies that it makes, as for sound, do not count.
        calls: How many have ended.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe, self.scheduler, self.calls = pipe, pipe.scheduler, 0

    @property
    def announced(self) -> int:
        """Length of the pipeline's loop, which is less than the scheduler's when it starts from a video."""
        return getattr(self._pipe, "num_timesteps", None) or len(self.scheduler.timesteps)

    @property
    def num_steps(self) -> int:
        """Number of steps; solvers of order two take two calls in a step, but only one in the last."""
        return math.ceil(self.announced / self.scheduler.order)

    @property
    def step(self) -> int:
        """Index of the step that is next or under way."""
        return self.calls // self.scheduler.order

    def expect_more(self) -> None:
        """Raise a UsageError if the denoiser is called after the last step."""
        if self.calls >= self.announced:
            raise UsageError(
                f"rollout: {type(self._pipe).__name__} takes more than its {self.announced} steps (FreeInit?)"
            )

    def expect_end(self) -> None:
        """Raise a UsageError if the loop ended early."""
        if self.calls != self.announced:
            raise UsageError(
                f"rollout: {type(self._pipe).__name__} announced {self.announced} scheduler steps and took "
                f"{self.calls}, so that gradient did not begin where it should; do not interrupt the call"
            )

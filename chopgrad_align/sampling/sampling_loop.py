"""Position in a pipeline's sampling loops, which is told by the calls of its denoisers and schedulers.

A call of a pipeline is one loop or several, its *sections*: the windows of a long video, of which each sees what those
before it made (FramePack, Helios, Cosmos Transfer, Wan Animate), the resolutions of a pyramid, the iterations of
FreeInit. `set_timesteps` begins one.

A section is a sequence of *iterations*, each of one or more calls of denoisers followed by one or more of schedulers.
So a scheduler that is called twice (Cosmos 1), copies of it for each latent frame (SkyReels V2 diffusion forcing) and
one for sound (LTX-2) count once. Denoisers can also be called between sections, to fill a cache of keys and values
(AnyFlow FAR).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sized
from typing import Any

from ..common.errors import UsageError


class _Earlier(int):
    """A number of iterations that was announced before a section began; it may be that of all sections."""


class SamplingLoop:
    """Count of the iterations of one call of a pipeline.

    Attributes:
        scheduler: The pipeline's own.
        section: Index of the section that is under way, or was last; -1 before the first.
        iteration: Index of the iteration in it.
        announced: Number of iterations of the section.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe, self.scheduler = pipe, pipe.scheduler
        self.section, self.iteration, self.announced = -1, 0, 0
        self._begins, self._stepped = False, False
        self._bar: tuple[Sized | None, int | None] = None, None

    @property
    def num_steps(self) -> int:
        """Number of steps; solvers of order two take two iterations in a step, but only one in the last."""
        return math.ceil(self.announced / self.scheduler.order)

    @property
    def step(self) -> int | None:
        """Index of the step that is under way; None between sections."""
        return self.iteration // self.scheduler.order if 0 <= self.iteration < self.announced else None

    @property
    def is_last(self) -> bool:
        """True in the last iteration of a section."""
        return self.iteration == self.announced - 1

    def begin(self) -> None:
        """Note that timesteps were set, so that the denoiser's next call begins a section."""
        self._begins, self._bar = True, (None, None)
        if type(said := vars(self._pipe).get("_num_timesteps")) is int:
            self._pipe._num_timesteps = _Earlier(said)

    def progress_bar(
        self, original: Callable[..., Any], pipe: Any, iterable: Sized | None = None, total: int | None = None
    ) -> Any:
        """Take the place of `pipe.progress_bar`, which tells the length of a loop."""
        self._bar = iterable, total
        return original(pipe, iterable, total)

    def predict(self) -> None:
        """Note that a denoiser is called.

        Raises:
            UsageError: It begins a section, and the one before ended early.
        """
        if self._begins:
            self.expect_end()
            self.section, self.iteration, self.announced = self.section + 1, 0, self._announcement()
            self._begins = self._stepped = False
        elif self._stepped:
            self.iteration, self._stepped = self.iteration + 1, False

    def take_step(self) -> None:
        """Note that a scheduler is called, the pipeline's or a copy of it.

        Raises:
            UsageError: The section has had all iterations that were announced.
        """
        if self.section >= 0 and self.step is None:
            raise UsageError(f"rollout: {type(self._pipe).__name__} takes more than its {self.announced} steps")
        self._stepped = True

    def expect_end(self) -> None:
        """Raise a UsageError if the section ended early."""
        taken = min(self.iteration + self._stepped, self.announced)
        if self.section >= 0 and taken != self.announced:
            raise UsageError(
                f"rollout: {type(self._pipe).__name__} announced {self.announced} scheduler steps and took {taken}, so "
                "that gradient did not begin where it should; do not interrupt the call"
            )

    def _announcement(self) -> int:
        """The length of the loop: of what a progress bar goes through, as the pipeline says, or the scheduler."""
        iterable, total = self._bar
        if iterable is not None:
            return len(iterable)
        said = getattr(self._pipe, "num_timesteps", None)
        if said is not None and not isinstance(said, _Earlier):
            return said
        count = len(self.scheduler.timesteps)
        if (sigmas := getattr(self.scheduler, "sigmas", None)) is not None:
            count = min(count, len(sigmas) - 1)  # some list the end of the last step as a timestep too
        if total is not None:  # less than the schedule's if the loop starts from a video
            count -= max(0, getattr(self.scheduler, "num_inference_steps", total) - total) * self.scheduler.order
        return count

"""Through which denoising steps a rollout backpropagates: a small frozen object that is passed to `rollout`."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.errors import UsageError


@dataclass(frozen=True)
class LastSteps:
    """Gradient through the last `count` denoising steps; the latents that enter the first of them are a constant.

    DRaFT-K (arXiv 2309.17400) and VADER (arXiv 2407.08737). Of N steps, all N run a forward pass, and the last K one
    more and one backward pass. The activations of one denoiser call are alive at a time, so that K costs time and
    hardly memory. More steps give gradient to layout and motion, which the early ones decide, but chained steps also
    amplify it: clip its norm. A count of N or more means every step.

    Args:
        count: K, 1 or more. A second-order scheduler (Heun) calls the denoiser twice in a step.
    """

    count: int

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise UsageError(f"LastSteps(count={self.count!r}): expected a whole number of denoising steps, 1 or more")

    def first(self, num_steps: int) -> int:
        """Index of the first of `num_steps` steps that carries gradient; all later ones do as well."""
        return max(0, num_steps - self.count)

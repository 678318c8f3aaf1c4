"""Did the reward rise? The same held-out prompts and seeds, scored before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from ..errors import UsageError


@dataclass(frozen=True)
class Paired:
    """What `paired` found; a standard error is the sample standard deviation divided by √count."""

    mean_before: float
    stderr_before: float
    mean_after: float
    stderr_after: float
    gain: float  # mean of after - before
    gain_in_stds: float  # gain, in sample standard deviations of the scores before
    p_value: float  # two-sided paired t-test
    count: int

    def __str__(self) -> str:
        return (
            f"{self.mean_before:.4g} ± {self.stderr_before:.2g} before, "
            f"{self.mean_after:.4g} ± {self.stderr_after:.2g} after: "
            f"{self.gain:+.3g} ({self.gain_in_stds:+.2f} standard deviations, p = {self.p_value:.1g}, n = {self.count})"
        )


def paired(before: Sequence[float], after: Sequence[float]) -> Paired:
    """Compare two scores of each pair of prompt and seed.

    Raises:
        UsageError: fewer than two pairs, different counts, or a score that is not finite.
    """
    if len(before) != len(after) or len(before) < 2:
        raise UsageError(f"expected at least two pairs of scores, got {len(before)} before and {len(after)} after")
    if not all(map(math.isfinite, [*before, *after])):
        raise UsageError("a held-out score is not finite; look for NaN in the reward and in the videos")
    count = len(before)
    difference = [b - a for a, b in zip(before, after, strict=True)]
    gain, root = fmean(difference), math.sqrt(count)
    return Paired(
        mean_before=fmean(before),
        stderr_before=stdev(before) / root,
        mean_after=fmean(after),
        stderr_after=stdev(after) / root,
        gain=gain,
        gain_in_stds=_ratio(gain, stdev(before)),
        p_value=_t_test_p(_ratio(gain, stdev(difference) / root), count - 1),
        count=count,
    )


def _ratio(gain: float, spread: float) -> float:
    if spread == 0:
        return math.copysign(math.inf, gain) if gain else 0.0
    return gain / spread


def _t_test_p(t: float, freedom: int) -> float:
    """P(|T| > |t|) for Student's T with `freedom` degrees of freedom.

    With T = √freedom · tan θ the density of θ is proportional to cos(θ)^(freedom - 1), a smooth integrand on a finite
    interval, which Gauss-Legendre quadrature integrates with full *relative* accuracy in the tail.
    """
    start = math.atan(abs(t) / math.sqrt(freedom))
    nodes, weights = np.polynomial.legendre.leggauss(200)
    half = (math.pi / 2 - start) / 2
    tail = half * float(weights @ np.cos(start + half * (1 + nodes)) ** (freedom - 1))
    whole = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    return min(1.0, tail / whole)

"""Did the reward rise? The same held-out prompts and seeds, scored before and after."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from ..common.errors import UsageError


@dataclass(frozen=True)
class Paired:
    """The result of `paired`; means and standard errors are of the conditions, each the mean of its pairs.

    A standard error is the sample standard deviation divided by √count.
    """

    mean_before: float
    stderr_before: float
    mean_after: float
    stderr_after: float
    gain: float  # mean of after - before
    margin: float  # gain ± margin is its 95 % confidence interval, of Student's t
    gain_in_stds: float  # gain, in sample standard deviations of the scores before, of all pairs
    p_value: float  # two-sided paired t-test
    count: int  # of pairs
    conditions: int

    @property
    def ratio(self) -> float:
        """Mean after relative to the mean before; NaN if that is not positive."""
        return self.mean_after / self.mean_before if self.mean_before > 0 else math.nan

    @property
    def significant(self) -> bool:
        """True if the confidence interval of the gain leaves out 0."""
        return abs(self.gain) > self.margin

    @property
    def sample(self) -> str:
        """The units that the test counts."""
        if self.conditions == self.count:
            return f"{self.count}"
        if self.conditions == 1:
            return f"{self.count} seeds of one condition"
        return f"{self.conditions} conditions, {self.count} pairs"

    def __str__(self) -> str:
        return (
            f"{self.mean_before:.4g} ± {self.stderr_before:.2g} before, "
            f"{self.mean_after:.4g} ± {self.stderr_after:.2g} after: "
            f"{self.gain:+.3g} ({self.gain_in_stds:+.2f} standard deviations, "
            f"p = {self.p_value:.1g}, n = {self.sample})"
        )


def paired(before: Sequence[float], after: Sequence[float], conditions: Sequence[Hashable] | None = None) -> Paired:
    """Compare two scores of each pair of condition and seed.

    Videos of one condition rise and fall together, so that two seeds of it tell less than two conditions would: the
    test is of the conditions, each with the mean of its pairs. Pairs that are all of one condition are tested as they
    are; the result then holds for other seeds, and says nothing of other conditions.

    Args:
        before: A score for each pair.
        after: The same pairs' scores.
        conditions: What each pair is a video of: equal for pairs of one prompt, one first image with its prompt, or one
            file of clips. The prompt alone is not enough where images or clips share one. Default: each pair has a
            condition of its own.

    Raises:
        UsageError: fewer than two pairs, different counts, or a score that is not finite.
    """
    _check_counts(before, after, conditions)
    if len(before) < 2:
        raise UsageError(f"expected at least two pairs of scores, got {len(before)} before and {len(after)} after")
    if not all(map(math.isfinite, [*before, *after])):
        raise UsageError("a held-out score is not finite; look for NaN in the reward and in the videos")
    places = range(len(before))
    units: Sequence[Hashable] = places if conditions is None else conditions
    distinct = len(set(units))
    if distinct == 1:
        units = places
    each_before, each_after = _means(before, units), _means(after, units)
    difference = [b - a for a, b in zip(each_before, each_after, strict=True)]
    gain, root = fmean(difference), math.sqrt(len(difference))
    return Paired(
        mean_before=fmean(each_before),
        stderr_before=stdev(each_before) / root,
        mean_after=fmean(each_after),
        stderr_after=stdev(each_after) / root,
        gain=gain,
        margin=_t_quantile(len(difference) - 1) * stdev(difference) / root,
        gain_in_stds=_ratio(gain, stdev(before)),
        p_value=_t_test_p(_ratio(gain, stdev(difference) / root), len(difference) - 1),
        count=len(before),
        conditions=distinct,
    )


def paired_where_finite(
    before: Sequence[float], after: Sequence[float], conditions: Sequence[Hashable]
) -> Paired | None:
    """`paired` over the pairs whose scores are both finite; None if there are fewer than two.

    Raises:
        UsageError: Different counts.
    """
    _check_counts(before, after, conditions)
    finite = [i for i, scores in enumerate(zip(before, after, strict=True)) if all(map(math.isfinite, scores))]
    if len(finite) < 2:
        return None
    return paired([before[i] for i in finite], [after[i] for i in finite], [conditions[i] for i in finite])


def _check_counts(before: Sequence[float], after: Sequence[float], conditions: Sequence[Hashable] | None) -> None:
    if len(before) != len(after):
        raise UsageError(f"expected at least two pairs of scores, got {len(before)} before and {len(after)} after")
    if conditions is not None and len(conditions) != len(before):
        raise UsageError(f"expected the condition of each pair of scores, got {len(conditions)} for {len(before)}")


def _means(scores: Sequence[float], units: Sequence[Hashable]) -> list[float]:
    """Mean score of each unit, in the order of their first scores."""
    of: dict[Hashable, list[float]] = {}
    for unit, score in zip(units, scores, strict=True):
        of.setdefault(unit, []).append(score)
    return [fmean(values) for values in of.values()]


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
    nodes, weights = _quadrature()
    half = (math.pi / 2 - start) / 2
    tail = half * float(weights @ np.cos(start + half * (1 + nodes)) ** (freedom - 1))
    whole = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    return min(1.0, tail / whole)


@functools.cache
def _t_quantile(freedom: int, p: float = 0.05) -> float:
    """The t for which P(|T| > t) = p; by bisection of the angle θ, T = √freedom · tan θ."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_test_p(math.sqrt(freedom) * math.tan(middle), freedom) > p else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


@functools.cache
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(200)

"""Numbers as people read them: as many digits as are known, and a real minus sign."""

from __future__ import annotations

import math

from .heldout import Paired


def fixed(value: float, places: int, sign: str = "") -> str:
    """A number with so many decimal places; a dash if it is not finite. `sign` may be `+`."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:{sign}.{places}f}"
    return text.replace("-", "−" if float(text) else "")  # nothing is written as −0


def places(*values: float) -> int:
    """Decimal places that show four digits of the largest of some numbers."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return min(max(3 - math.floor(math.log10(largest)), 0), 9) if largest else 1


def before_and_after(change: Paired) -> tuple[str, str, str, str]:
    """Means before and after, their difference and its 95 % interval, to the second digit of the interval's half."""
    if change.margin > 1e-9 * max(abs(change.mean_before), abs(change.mean_after)):
        digits = min(max(1 - math.floor(math.log10(change.margin)), 0), 9)
    else:
        digits = places(change.mean_before, change.mean_after)
    low, high = (fixed(change.gain + side * change.margin, digits, "+") for side in (-1, 1))
    means = (fixed(mean, digits) for mean in (change.mean_before, change.mean_after))
    return (*means, fixed(change.gain, digits, "+"), f"{low} to {high}")  # type: ignore[return-value]


def p_value(p: float) -> str:
    """A p value to its first digit, or to two places if it is large."""
    return f"{p:.2f}" if p >= 0.095 else f"{p:.1g}"


def duration(seconds: float) -> str:
    """Seconds in the unit that people would choose."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

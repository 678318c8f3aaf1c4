r"""Binomial checkpointing: a recurrence run backwards with few of its states kept, in the fewest steps forward.

To reverse $l$ steps, given the state before the first of them and room for $s$ states more, step $j$ forward, keep the
state there, reverse the steps after it with room for $s - 1$, and then those before it with room for $s$ again. Revolve
(Griewank and Walther, 2000, ACM TOMS 26(1), section 2) proves that the best $j$ takes

$$ t(l, s) = r l - \binom{s + r}{s + 1}, \qquad \binom{s + r - 1}{s} < l \le \binom{s + r}{s} $$

steps forward, of which each is taken at most $r$ times. $t$ also counts those of the first run, $l - 1$, in which the
first states are kept.
"""

from __future__ import annotations

from functools import cache
from math import comb, inf


@cache
def steps_forward(length: int, states: int) -> float:
    """The least number of steps forward to reverse `length` steps with room for `states` beside the first.

    Infinite if it cannot be done, which is without room.
    """
    if length == 1 or not states:
        return 0 if length == 1 else inf
    repetitions = next(r for r in range(1, length) if length <= comb(states + r, states))
    return repetitions * length - comb(states + repetitions, states + 1)


@cache
def first_state(length: int, states: int | None) -> int:
    """The number of the step before which the first of so many states is kept; without a limit that is the next one."""
    if states is None or states >= length - 1:
        return 1
    return min(range(1, length), key=lambda j: j + steps_forward(length - j, states - 1) + steps_forward(j, states))


def states_of_first_run(length: int, states: int | None) -> list[int]:
    """The steps before which a state is kept in the first run, step 0 included, whose state costs no room here."""
    kept = [0]
    while (rest := length - kept[-1]) > 1:
        kept.append(kept[-1] + first_state(rest, None if states is None else states + 1 - len(kept)))
    return kept

"""Checks of arguments that every chapter makes alike."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .errors import UsageError


def whole_number(argument: str, value: object, at_least: int = 1) -> int:
    """`value` if it is a whole number, `at_least` or more.

    Raises:
        UsageError: It is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise UsageError(f"{argument}={value!r}: expected a whole number, {at_least} or more")
    return value


def nearest(name: object, known: Iterable[str]) -> str:
    """A hint for an error's sentence, `; did you mean 'NAME'?`; empty if no known name is near enough to be meant."""
    found = difflib.get_close_matches(str(name), list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""

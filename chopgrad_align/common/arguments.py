"""Checks of arguments that every chapter makes alike."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from .errors import UsageError

_NEAR = 0.75  # of `difflib`'s ratio: 'wight' is near 'weight', and 'optimizer' near nothing that ends alike
_PART_BYTES, _PATH_BYTES = 255, 1024  # the limit of common file systems; and one that leaves room for a run's own names


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
    found = difflib.get_close_matches(str(name), list(known), 1, _NEAR)
    return f"; did you mean {found[0]!r}?" if found else ""


def readable_text(text: str) -> str:
    """`text` if it can be written to a file and shown in a line.

    Raises:
        UsageError: It has a control character, or half a character (a lone surrogate).
    """
    if bad := next((c for c in text if unicodedata.category(c) in ("Cc", "Cs")), None):
        raise UsageError(f"expected text without control characters, got {shown(text)} with {bad!r}")
    return text


def usable_path(text: str) -> str:
    """`text` if a file system can be asked for it.

    Raises:
        UsageError: It is blank, has control characters, or is too long.
    """
    if not text.strip():
        raise UsageError(f"expected a name, got {text!r}")
    longest = max((len(part.encode()) for part in Path(readable_text(text)).parts), default=0)
    if longest > _PART_BYTES or len(text.encode()) > _PATH_BYTES:
        raise UsageError(f"expected a name of at most {_PART_BYTES} bytes, got {shown(text)} of {len(text.encode())}")
    return text


def shown(value: object, most: int = 60) -> str:
    """`value` as Python writes it, cut short if it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"

"""Shared parts of command lines."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import NoReturn

from .arguments import usable_path
from .errors import UsageError


class Parser(argparse.ArgumentParser):
    """A parser whose help shows a module's docstring as it is, and whose errors are one line, with status 2.

    Args:
        description: The docstring.
        command: Of `chopgrad-align`, for the usage line; default: the name of the script that runs.
    """

    def __init__(self, description: str | None, command: str | None = None) -> None:
        super().__init__(
            prog=f"chopgrad-align {command}" if command else None,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Print one line and exit."""
        self.exit(2, f"error: {message}; see --help\n")


def size(text: str) -> tuple[int, int]:
    """Height and width in pixels from HEIGHTxWIDTH."""
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 480x832, got {text!r}")
    return int(match[1]), int(match[2])


def name(text: str) -> str:
    """The name of a file, a folder or a model, that a file system can be asked for."""
    try:
        return usable_path(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path(text: str) -> Path:
    """A path, checked as `name`."""
    return Path(name(text))


def count(text: str) -> int:
    """A whole number, 1 or more."""
    if not re.fullmatch(r"0*[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, got {text!r}")
    return int(text)


def whole(text: str) -> int:
    """A whole number, 0 or more, such as a seed, to which places of videos are added."""
    if not (text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more and below 2^63, got {text!r}")
    return int(text)


def finite(text: str) -> float:
    """A number, neither infinite nor NaN."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return number


def frames_per_second(text: str) -> float:
    """A number between 0.01 and 1000."""
    number = finite(text)
    if not 0.01 <= number <= 1000:
        raise argparse.ArgumentTypeError(f"expected 0.01 to 1000 frames a second, got {text}")
    return number


def device(text: str) -> str:
    """A device that this machine has."""
    import torch

    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise argparse.ArgumentTypeError(f"no device {text!r} here, such as cpu or cuda ({reason})") from None
    return text

"""Types of arguments that scripts share, for `argparse`."""

from __future__ import annotations

import argparse
import re


def size(text: str) -> tuple[int, int]:
    """Height and width in pixels from HEIGHTxWIDTH."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 480x832, got {text!r}")
    return int(match[1]), int(match[2])

"""One line of the table of pipelines: a tiny one of a class, its least call, and what a row of data must bring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TOLERANCE = 2e-5
"""Of a gradient, in parts of the norm of plain autograd's: rounding in float32, in which most pipelines have parts."""
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Entry:
    """A tiny pipeline of one class, whose components are of the classes that published models have.

    Attributes:
        make: Makes it, always with the same weights.
        call: Arguments of its call that are the same for all videos: size, steps, guidance.
        row: Arguments that are a video's own: texts, PIL images, lists of them for videos.
        targets: Of a LoRA on its denoiser.
        fault: Why no rollout of it has a gradient, in words for its users; empty if one has.
        untrained: Why no config trains it, though a rollout works; empty if one does.
    """

    make: Callable[[], Any]
    call: Mapping[str, Any]
    row: Mapping[str, Any] = field(default_factory=dict)
    targets: Sequence[str] | str = TARGETS
    fault: str = ""
    untrained: str = ""

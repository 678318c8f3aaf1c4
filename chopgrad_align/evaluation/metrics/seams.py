"""Seams: does a long video show where its windows meet."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ...common.errors import UsageError
from ...sampling.predictions.windows import windows
from .base import Metric


class Seams(Metric):
    """How much more a video's changes from frame to frame differ from its target's where windows meet than elsewhere.

    The mean absolute error of the differences of neighbouring frames, over those steps in time that lie within an
    overlap of windows or lead into or out of it, divided by the same over all other steps: 1 is seamless. It is not
    defined (NaN) for a clip of one window, nor for one whose changes have no error anywhere.

    Args:
        device: Not needed.
        spans: `WINDOW:OVERLAP`, frames of a window and of what two share, as in `prediction.windows.windows`.

    Raises:
        UsageError: Something else.
    """

    def __init__(self, device: torch.device, spans: str = "") -> None:
        try:
            self._window, self._overlap = map(int, spans.split(":"))
        except ValueError:
            raise UsageError(
                f"metric seams: expected seams:WINDOW:OVERLAP in frames, such as seams:17:5, got {spans!r}"
            ) from None
        windows(self._window, self._window, self._overlap)  # raises what is wrong with them

    def __call__(self, video: Tensor, target: Tensor) -> float:
        if len(video) <= self._window:
            return math.nan
        errors = (video.diff(dim=0) - target.diff(dim=0)).abs().double().flatten(1).mean(1)
        seam = torch.zeros(len(errors), dtype=torch.bool, device=errors.device)
        for before, after in pairwise(windows(len(video), self._window, self._overlap)):
            seam[after.start - 1 : before.stop] = True
        return (errors[seam].mean() / errors[~seam].mean()).item()

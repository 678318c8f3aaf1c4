"""Flicker: brightness that changes and changes back at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .bounds import Bounds
from .protocol import Witness, luma


class Flicker(Witness):
    """Mean over pixels and frames of how far brightness goes back on itself, in [0, 1].

    With the changes `d_t = x_(t+1) - x_t` of a pixel's brightness it is the mean of `min(|d_t|, |d_(t+1)|)` where the
    two have opposite signs, and 0 elsewhere. A brightness that alternates by ±a costs 2a; a fade costs nothing, nor
    does an edge that passes: motion counts only where things are thinner than what they move in a frame.
    """

    bounds = Bounds(most=2.0)

    def observe(self, video: Tensor, prompts: list[str], seeds: Sequence[int]) -> Tensor:
        """See `Witness`; NaN for fewer than three frames."""
        change = luma(video).diff(dim=1)
        before, after = change[:, :-1], change[:, 1:]
        back = torch.minimum(before.abs(), after.abs()) * (before * after < 0)
        return back.flatten(1).mean(1)

"""Motion as displacement, by block matching."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .bounds import Bounds
from .protocol import Witness, luma

_SIDE, _BLOCK, _REACH = 64, 8, 6  # pixels, of frames whose shorter side was brought to 64 if it was longer
_COST = 1 / 255  # of brightness, for each pixel of displacement: where all displacements fit as well, nothing moves


class Flow(Witness):
    """Mean length of the displacement of blocks from one frame to the next, in pixels of the video.

    Full-search block matching (Jain and Jain, "Displacement measurement and its application in interframe image
    coding", IEEE Trans. Commun. 29(12), 1981) of the brightness, without weights: for each block of 8x8 pixels the
    displacement up to 6 pixels across and down with the smallest mean absolute difference, plus 1/255 for each pixel of
    its length. Larger frames are first averaged down to a shorter side of 64 pixels, so that the reach is a tenth of
    it, and whole pixels of that size are counted. Unlike `motion` it does not rise with contrast.
    """

    bounds = Bounds(0.7, 2.0)

    def observe(self, video: Tensor, prompts: list[str], seeds: Sequence[int]) -> Tensor:
        """See `Witness`; NaN for a single frame."""
        grey = luma(video)
        scale = max(1.0, min(grey.shape[2:]) / _SIDE)
        if scale > 1:
            grey = F.interpolate(grey, tuple(round(side / scale) for side in grey.shape[2:]), mode="area")
        height, width = grey.shape[2:]
        first = grey[:, :-1].flatten(0, 1)
        second = F.pad(grey, (_REACH,) * 4, mode="replicate")[:, 1:].flatten(0, 1)
        shifts = list(itertools.product(range(-_REACH, _REACH + 1), repeat=2))
        lengths = grey.new_tensor(shifts).norm(dim=1)
        best = length = torch.full((), torch.inf, device=grey.device)
        for (down, right), way in zip(shifts, lengths, strict=True):
            moved = second[..., _REACH + down :, _REACH + right :][..., :height, :width]
            cost = F.avg_pool2d((first - moved).abs().unsqueeze(1), _BLOCK, ceil_mode=True) + _COST * way
            length = torch.where(cost < best, way, length)
            best = torch.minimum(cost, best)
        return length.view(len(video), -1).mean(1) * scale

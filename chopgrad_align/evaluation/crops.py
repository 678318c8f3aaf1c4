"""Crops in which a method is better or worse than another: square parts of frames, found by their error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Crop:
    """A square of one frame, of every video of a clip."""

    clip: str
    frame: int
    error: float
    """Mean squared error of the method in it."""
    reference_error: float | None
    pictures: Mapping[str, Tensor]
    """`(1, 3, side, side)` in [0, 1] each."""


class CropSearch:
    """Looks at clip after clip, and keeps the few squares in which a method gains most, and loses most.

    The gain is the mean squared error of the reference minus that of the method; without a reference, minus its own
    error. A clip gives one square of each kind.

    Args:
        method: Name of its videos.
        reference: Of those that it is compared with; None for none.
        most: Squares of each kind.
    """

    def __init__(self, method: str, reference: str | None, most: int = 3) -> None:
        self.method, self.reference, self._most = method, reference, most
        self.best: list[Crop] = []
        self.worst: list[Crop] = []

    def look(self, clip: str, videos: Mapping[str, Tensor], target: Tensor) -> None:
        """Consider a clip: videos by name, and the target, all `(F, 3, H, W)`."""
        side = min(*target.shape[2:], max(32, min(target.shape[2:]) // 4))
        error = _error_map(videos[self.method], target, side)
        base = None if self.reference is None else _error_map(videos[self.reference], target, side)
        gain = -error if base is None else base - error
        places = [(self.best, gain.argmax()), (self.worst, gain.argmin())]
        if base is not None:  # only real gains, and real losses
            places = [places[i] for i, there in enumerate([gain.max() > 0, gain.min() < 0]) if there]
        for kept, place in places:
            frame, row, column = (int(i) for i in torch.unravel_index(place.cpu(), gain.shape))
            top, left = row * _stride(side), column * _stride(side)
            pictures = {
                name: video[frame : frame + 1, :, top : top + side, left : left + side].cpu().clone()
                for name, video in {**videos, "target": target}.items()
            }
            there = error[frame, row, column].item(), None if base is None else base[frame, row, column].item()
            kept.append(Crop(clip, frame, *there, pictures))
        self.best = sorted(self.best, key=_gain, reverse=True)[: self._most]
        self.worst = sorted(self.worst, key=_gain)[: self._most]


def _gain(crop: Crop) -> float:
    return (crop.reference_error or 0.0) - crop.error


def _stride(side: int) -> int:
    return max(side // 4, 1)


def _error_map(video: Tensor, target: Tensor, side: int) -> Tensor:
    """Mean squared error of squares, `(F, rows, columns)`."""
    return F.avg_pool2d((video - target).square().mean(1), side, _stride(side))

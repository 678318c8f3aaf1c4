"""Object removal: how surely a detector sees an object in a frame no more."""

from __future__ import annotations

from torch import Tensor

from .detection import ObjectReward


class ObjectRemoval(ObjectReward):
    """Probability, in [0, 1], that `target` is not in a frame: 1 minus `ObjectPresence`, which names the sources.

    The arguments are described in `rewards/detection.py`.
    """

    name = "object_removal"

    def score_frames(self, frames: Tensor, prompts: list[str]) -> Tensor:
        return (-self.detector(frames)).sigmoid()  # 1 - sigmoid(x), exact also where that rounds to 0

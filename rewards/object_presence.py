"""Object presence: how surely a detector sees an object in a frame."""

from __future__ import annotations

from torch import Tensor

from .detection import ObjectReward


class ObjectPresence(ObjectReward):
    """Probability, in [0, 1], that a detector gives to `target` in a frame.

    Detectors: YOLOS (Fang et al., arXiv 2106.00666) for COCO's classes, Grounding DINO (Liu et al., arXiv 2303.05499)
    for any phrase. Detections as rewards: VADER (Prabhudesai et al., arXiv 2407.08737), which averages those above a
    threshold, so that without any there is no gradient; here all queries enter, by a smooth maximum. That, the
    preprocessing and the arguments are described in `rewards/detection.py`.
    """

    name = "object_presence"

    def score_frames(self, frames: Tensor, prompts: list[str]) -> Tensor:
        return self.detector(frames).sigmoid()

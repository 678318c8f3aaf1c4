"""Warping error: do colours stay on what moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...common.errors import UsageError
from ...common.optical_flow import OpticalFlow, occluded, warp
from .base import Metric, expect_size

_SMALLEST = 16  # pixels of a side, of DIS

Flow = Callable[[Tensor, Tensor], Tensor]
"""The function that `OpticalFlow.forward` is."""


class WarpingError(Metric):
    """The warping error of Lai et al., "Learning Blind Video Temporal Consistency" (arXiv 1808.00449), section 4.

    The next frame is read back along the optical flow *of the target*, and compared with this frame: mean squared
    difference of the colours in [0, 1] over the pixels that stay visible, then the mean over pairs of frames. So it
    asks how well a video moves as its target moves, and still videos are not the best ones. Hidden are pixels that
    leave the frame, and those where the flow forward and back disagree or has an edge (see `occluded`). A pair without
    any visible pixel (a cut) is left out; a clip of such pairs has no error (NaN).

    It is not 0 for a perfect video: the target has one too, for light changes and flow is not exact. To compare with,
    evaluate the target as a method; a blurred video can have less (see `RelativeWarpingError`). Figures of different
    flows do not compare; the paper's is FlowNet2.

    Args:
        device: Where a flow network goes.
        flow: `dis`: "Fast Optical Flow using Dense Inverse Search" (Kroeger et al., arXiv 1603.03590) by OpenCV, on the
            CPU, which needs no weights. `raft` or `raft_small`, or `raft:WEIGHTS`: see `OpticalFlow`.

    Raises:
        UsageError: No such flow, or its weights cannot be had.
    """

    def __init__(self, device: torch.device, flow: str = "dis") -> None:
        name, _, weights = flow.partition(":")
        if name not in ("dis", "raft", "raft_small") or (name == "dis" and weights):
            raise UsageError(f"warping_error:{flow}: expected dis, raft or raft_small as its flow")
        if name == "dis":
            self.flow: Flow = _dis()
        else:
            size: Literal["large", "small"] = "large" if name == "raft" else "small"
            self.flow = OpticalFlow(f"warping_error:{name}", weights or "DEFAULT", size, 12).eval().to(device)

        self._target = torch.empty(0)
        self._motion: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def __call__(self, video: Tensor, target: Tensor) -> float:
        expect_size("warping_error", video, frames=2, side=_SMALLEST)
        if target is not self._target:  # other methods on the same clip follow, and the flow is most of the work
            self._target, self._motion = target, [self._between(*pair) for pair in pairwise(target.split(1))]
        errors = []
        for here, there, (flow, visible) in zip(video[:-1], video[1:], self._motion, strict=True):
            if visible.any():
                error = (warp(there[None], flow)[0] - here).square()
                errors.append(error[:, visible].double().mean().item())
        return sum(errors) / len(errors) if errors else math.nan

    def _between(self, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """The flow `(1, 2, H, W)` between two frames `(1, 3, H, W)`, and a mask `(H, W)` of where it holds."""
        flow, back = self.flow(here, there), self.flow(there, here)
        return flow, (~occluded(flow, back) & _within(flow))[0]


def _within(flow: Tensor) -> Tensor:
    """Mask `(N, H, W)`: true where the flow `(N, 2, H, W)` stays in the frame."""
    height, width = flow.shape[-2:]
    x = flow[:, 0] + torch.arange(width).to(flow)
    y = flow[:, 1] + torch.arange(height).to(flow).unsqueeze(1)
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def _dis() -> Flow:
    import cv2

    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)  # the most careful of the presets

    def grey(frame: Tensor) -> np.ndarray:
        pixels = (frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)

    def flow(first: Tensor, second: Tensor) -> Tensor:
        start = np.zeros((*first.shape[2:], 2), np.float32)
        flows = [estimator.calc(grey(a), grey(b), start.copy()) for a, b in zip(first, second, strict=True)]
        return torch.from_numpy(np.stack(flows)).permute(0, 3, 1, 2).to(first.device)

    return flow

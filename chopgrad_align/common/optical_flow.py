"""Optical flow between frames by RAFT, warping by it, and where it does not hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import whole_number
from .errors import UsageError
from .weight_files import load_weights, loading

_SMALLEST = 128  # pixels of a side; RAFT's correlation pyramid needs 16 positions, 8 pixels apart


class OpticalFlow(nn.Module):
    """RAFT (Teed and Deng, arXiv 2003.12039) of torchvision, with an exact gradient.

    Preprocessing is torchvision's: colours to [-1, 1]. Sides are padded to a multiple of 8 by repeating the border, as
    in the official evaluation, and to 128 at least, the smallest that the model takes.

    torchvision's own forward cuts the gradient between the updates, as RAFT is trained; the derivative of the flow is
    then that of the last update alone. Here nothing is cut, and the flow is the same.

    Args:
        name: What messages call the reward or loss.
        weights: The name of torchvision's weights for the model (`"DEFAULT"`, `"C_T_V2"`, …), which are downloaded,
            or the path of a file with such weights (`.pth`, read with `weights_only=True`, or safetensors).
        model: `"large"` or `"small"`.
        updates: Refinements of the flow.

    Raises:
        UsageError: The weights are missing, unreachable or of another model; an argument is out of range.
    """

    def __init__(self, name: str, weights: str, model: Literal["large", "small"], updates: int) -> None:
        super().__init__()
        from torchvision.models import optical_flow

        if model not in ("large", "small"):
            raise UsageError(f"{name}: model={model!r}: expected 'large' or 'small'")
        self.updates = whole_number(f"{name}: updates", updates)
        large = model == "large"
        self.raft = optical_flow.raft_large() if large else optical_flow.raft_small()
        published = optical_flow.Raft_Large_Weights if large else optical_flow.Raft_Small_Weights
        names = ", ".join(published.__members__)
        with loading(f"{name}: weights={weights!r}", f"one of torchvision's names ({names}), or a file of its weights"):
            if weights in published.__members__:
                state = published[weights].get_state_dict(progress=False, check_hash=True, weights_only=True)
                self.raft.load_state_dict(state)
            else:
                load_weights(self.raft, Path(weights).expanduser())

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Flow `(N, 2, H, W)` in pixels from `first` to `second`, each `(N, 3, H, W)` in [0, 1].

        Channel 0 is the way to the right, channel 1 the way down.
        """
        from torchvision.models.optical_flow._utils import upsample_flow

        height, width = first.shape[-2:]
        missing = [max(_SMALLEST, math.ceil(side / 8) * 8) - side for side in (height, width)]
        top, left = missing[0] // 2, missing[1] // 2
        padding = (left, missing[1] - left, top, missing[0] - top)
        weight = next(self.raft.parameters())
        first, second = (F.pad((x * 2 - 1).to(weight.dtype), padding, mode="replicate") for x in (first, second))

        raft, block = self.raft, self.raft.update_block
        features = raft.feature_encoder(torch.cat([first, second]))
        # Positions need more digits than half precision has, and what is sampled at them the same type.
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        raft.corr_block.build_pyramid(*wide.chunk(2))
        context = raft.context_encoder(first)
        state, context = context.split([block.hidden_state_size, context.shape[1] - block.hidden_state_size], dim=1)
        state, context = state.tanh(), context.relu()
        rows, columns = (torch.arange(n, device=wide.device, dtype=wide.dtype) for n in features.shape[-2:])
        start = torch.stack(torch.meshgrid(columns, rows, indexing="xy")).expand(len(first), -1, -1, -1)
        flow = torch.zeros_like(start)
        for _ in range(self.updates):
            correlation = raft.corr_block.index_pyramid(start + flow)
            state, step = block(state, context, correlation.to(state.dtype), flow.to(state.dtype))
            flow = flow + step
        raft.corr_block.corr_pyramid = []  # torchvision would hold the volume, and its graph, until the next call
        mask = None if raft.mask_predictor is None else raft.mask_predictor(state).to(flow.dtype)
        return upsample_flow(flow, mask)[..., top : top + height, left : left + width]


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """`image` `(N, C, H, W)` read, bilinearly, where `flow` `(N, 2, H, W)` in pixels leads; outside, at the border."""
    height, width = image.shape[-2:]
    rows, columns = (torch.arange(n, device=flow.device, dtype=flow.dtype) for n in (height, width))
    x, y = flow[:, 0] + columns, flow[:, 1] + rows.unsqueeze(1)
    grid = torch.stack([x * (2 / max(1, width - 1)) - 1, y * (2 / max(1, height - 1)) - 1], dim=-1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)


def occluded(forward: Tensor, backward: Tensor) -> Tensor:
    """Pixels that have no partner in the next frame, or lie at an edge of motion.

    Flows `(N, 2, H, W)` in pixels from this frame to the next and back -> `(N, H, W)`, boolean. Sundaram, Brox and
    Keutzer, "Dense point trajectories by GPU-accelerated large displacement optical flow" (ECCV 2010), section 4.
    """
    back = warp(backward, forward)
    length, back_length, round_trip = (v.square().sum(1) for v in (forward, back, forward + back))
    lost = round_trip > 0.01 * (length + back_length) + 0.5
    across = F.pad(forward.diff(dim=3), (0, 1)).square().sum(1)
    down = F.pad(forward.diff(dim=2), (0, 0, 0, 1)).square().sum(1)
    return lost | (across + down > 0.01 * length + 0.002)

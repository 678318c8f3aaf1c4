"""LPIPS: learned perceptual image patch similarity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.errors import UsageError
from ..reward.frames import Frames
from .backbone import Network, backbone, learned_weights, run
from .protocol import FrameLoss, expect_size

# The ReLUs that are compared, and the smallest side for which the last of them has a position.
_LAYERS = {"vgg": ((3, 8, 15, 22, 29), 16), "alex": ((1, 4, 7, 9, 11), 31)}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(FrameLoss):
    """`Σ_l mean_yx Σ_c w_lc (û_lc - v̂_lc)²`, 0 where the video is the target; seldom above 1.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (arXiv 1801.03924), version
    0.1: û and v̂ are features of video and target at five ReLUs of a network trained on ImageNet, at each position
    scaled to length 1, and w weights learned from people's judgements, which the package `lpips` carries. Colours go in
    as officially: to [-1, 1], then shifted and scaled.

    The value is that of the package `lpips`, which averages over each layer or enlarges its map to the frame. Here a
    mask is brought to each layer's own size instead, so that without one the value stays the official one; and the
    network can come from a local file.

    Args:
        network: `"vgg"`, which its authors advise for training, or `"alex"`, the one that is mostly reported.
        checkpoint: A local file of the network in torchvision's format; None downloads it. See `backbone`.
        frames, frames_per_chunk, inside, outside: As for `FrameLoss`. The activations of VGG are large, about 1 GB for
            a frame of 480x832 pixels: therefore few frames at a time.

    Raises:
        UsageError: As for `FrameLoss`; the network is unknown, its weights cannot be loaded, or frames are smaller than
            16x16 pixels (AlexNet: 31x31).
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        *,
        network: Network = "vgg",
        checkpoint: str | None = None,
        frames: Frames = "all",
        frames_per_chunk: int = 2,
        inside: float = 1.0,
        outside: float = 1.0,
    ) -> None:
        super().__init__(frames=frames, frames_per_chunk=frames_per_chunk, inside=inside, outside=outside)
        if network not in _LAYERS:
            raise UsageError(f"LPIPS: network={network!r}: expected 'vgg' or 'alex'")
        self.ends, self.smallest = _LAYERS[network]
        learned = learned_weights("lpips", f"weights/v0.1/{network}.pth")
        self.features = backbone("LPIPS", network, checkpoint)
        for layer in range(len(self.ends)):
            self.register_buffer(f"weight_{layer}", learned[f"lin{layer}.model.1.weight"])
        self.register_buffer("shift", torch.tensor(_SHIFT).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(3, 1, 1))

    def error(self, frames: Tensor, target: Tensor) -> list[Tensor]:
        expect_size("LPIPS", frames, self.smallest)
        with torch.no_grad():  # the target is given
            wanted = self._directions(target)
        pairs = enumerate(zip(self._directions(frames), wanted, strict=True))
        return [F.conv2d((u - v).square(), self.get_buffer(f"weight_{layer}"))[:, 0] for layer, (u, v) in pairs]

    def _directions(self, frames: Tensor) -> list[Tensor]:
        """`(N, 3, H, W)` in [0, 1] -> for each layer `(N, C, h, w)`, of length 1 over C."""
        features = run(self.features, (frames * 2 - 1 - self.shift) / self.scale, self.ends)
        return [F.normalize(feature, dim=1, eps=1e-10) for feature in features]

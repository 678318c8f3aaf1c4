"""DISTS: deep image structure and texture similarity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reward.frames import Frames
from .backbone import backbone, learned_weights, run
from .protocol import FrameLoss, expect_size

_ENDS = (3, 8, 15, 22, 29)  # the ReLUs of VGG-16 that are compared
_POOLS = (4, 9, 16, 23)
_CHANNELS = (3, 64, 128, 256, 512, 512)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SMALL = 1e-6


class DISTS(FrameLoss):
    """`1 - Σ_lc (α_lc l(u_lc, v_lc) + β_lc s(u_lc, v_lc))`, 0 where the video is the target; seldom above 1.

    Ding et al., "Image Quality Assessment: Unifying Structure and Texture Similarity" (arXiv 2004.07728): u and v are
    the channels of the frame itself and of its features at five ReLUs of VGG-16, trained on ImageNet, whose pooling is
    an L2 pooling with a Hann window; l compares their means over the frame (texture), `(2 μ_u μ_v + c) / (μ_u² + μ_v²
    + c)`, and s their covariance (structure), `(2 σ_uv + c) / (σ_u² + σ_v² + c)`, c = 1e-6. The learned weights α, β,
    which sum to 1, are those that torchmetrics carries.

    The value is that of the official code, but for rounding: there and in the libraries the covariance is a difference
    of two large numbers, so that in float32 a frame differs from itself. Here both are centred first. A mask can leave
    a region out, but not weigh it.

    Args:
        checkpoint: A local file of VGG-16 in torchvision's format; None downloads it. See `backbone`.
        frames, frames_per_chunk, inside, outside: As for `LPIPS`.

    Raises:
        UsageError: As for `FrameLoss`; the weights cannot be loaded, or frames are smaller than 16x16 pixels.
    """

    has_map = False
    mean: Tensor
    std: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        *,
        checkpoint: str | None = None,
        frames: Frames = "all",
        frames_per_chunk: int = 2,
        inside: float = 1.0,
        outside: float = 1.0,
    ) -> None:
        super().__init__(frames=frames, frames_per_chunk=frames_per_chunk, inside=inside, outside=outside)
        learned = learned_weights("torchmetrics", "functional/image/dists_models/weights.pt")
        self.features = backbone("DISTS", "vgg", checkpoint)
        for pool in _POOLS:
            self.features[pool] = _L2Pool()
        total = learned["alpha"].sum() + learned["beta"].sum()
        self.register_buffer("alpha", learned["alpha"].flatten() / total)
        self.register_buffer("beta", learned["beta"].flatten() / total)
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1))

    def error(self, frames: Tensor, target: Tensor) -> Tensor:
        expect_size("DISTS", frames, 16)
        with torch.no_grad():  # the target is given
            wanted = self._channels(target)
        similarity = torch.zeros_like(frames[:, 0, 0, 0])
        weights = zip(self.alpha.split(_CHANNELS), self.beta.split(_CHANNELS), strict=True)
        for u, v, (alpha, beta) in zip(self._channels(frames), wanted, weights, strict=True):
            mean_u, mean_v = u.mean((2, 3), keepdim=True), v.mean((2, 3), keepdim=True)
            texture = (2 * mean_u * mean_v + _SMALL) / (mean_u.square() + mean_v.square() + _SMALL)
            u, v = u - mean_u, v - mean_v
            covariance, spread = (u * v).mean((2, 3)), (u.square() + v.square()).mean((2, 3))
            structure = (2 * covariance + _SMALL) / (spread + _SMALL)
            similarity = similarity + texture.flatten(1) @ alpha + structure @ beta
        return 1 - similarity

    def _channels(self, frames: Tensor) -> list[Tensor]:
        """`(N, 3, H, W)` in [0, 1] -> itself, then for each layer `(N, C, h, w)`."""
        return [frames, *run(self.features, (frames - self.mean) / self.std, _ENDS)]


class _L2Pool(nn.Module):
    """`sqrt(w * x²)` at every second position, w a Hann window of 3x3 positions."""

    def forward(self, x: Tensor) -> Tensor:
        window = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
        weight = torch.outer(window, window).expand(x.shape[1], 1, 3, 3)
        pooled = F.conv2d(x.square(), weight, stride=2, padding=1, groups=x.shape[1])
        return (pooled + 1e-12).sqrt()  # the root of zero has no gradient

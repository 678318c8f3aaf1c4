"""Fréchet video distance."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.errors import UsageError
from .base import SetMetric
from .video_features import load_features


class FVD(SetMetric):
    """Fréchet video distance (Unterthiner et al., arXiv 1812.01717) between predicted clips and their targets.

    Both sets of features are taken for Gaussian: `|m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½)`, with the sample covariances
    (divided by N - 1). It asks whether the clips are of one kind, not whether each is like its own target.

    The figure belongs to the network that is named: those of different networks, or preprocessings, do not compare.
    I3D's answers more to the look of single frames than to motion (Ge et al., arXiv 2404.12391), VideoMAE's less so.
    Nor do figures of different numbers of clips: few clips make it too high (Chong and Forsyth, arXiv 1911.07023), and
    papers take 2048 or more.

    Args:
        device: Where the network goes.
        network: `videomae:CHECKPOINT` or `i3d:FILE`, see `load_features`.

    Raises:
        UsageError: No such network, or it cannot be loaded.
    """

    def __init__(self, device: torch.device, network: str = "") -> None:
        self._features = load_features(network, device)

    def features(self, video: Tensor) -> Tensor:
        with torch.no_grad():
            return self._features(video).double().cpu()

    def distance(self, features: Tensor, target: Tensor) -> float:
        return frechet_distance(features, target)

    def note(self, features: Tensor) -> str:
        count, dimension = features.shape
        text = "figures of other feature networks, or of another number of clips, do not compare with it"
        if count <= dimension:
            text += f"; {count} clips do not fill the covariance of {dimension} features, so it is far too high"
        return text


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance between the Gaussians of two sets of features `(N, D)`, `(M, D)`.

    With centred features A, B, divided by `√(N - 1)`: S1 = AᵀA and S2 = BᵀB, and the eigenvalues of S1 S2 that are not
    0 are those of (ABᵀ)ᵀ(ABᵀ). So the trace of the root is the sum of the singular values of ABᵀ: no root of a
    singular matrix, and nothing of the size D².

    Raises:
        UsageError: A set has fewer than two members.
    """
    if min(len(first), len(second)) < 2:
        raise UsageError(
            f"fvd needs at least 2 clips for a covariance, and thousands for a steady figure; got {len(first)} and "
            f"{len(second)}: take more clips or leave it out"
        )
    means = [x.double().mean(0) for x in (first, second)]
    a, b = ((x.double() - m) / (len(x) - 1) ** 0.5 for x, m in zip((first, second), means, strict=True))
    traces = a.square().sum() + b.square().sum() - 2 * torch.linalg.matrix_norm(a @ b.T, "nuc")
    return ((means[0] - means[1]).square().sum() + traces).clamp(min=0).item()

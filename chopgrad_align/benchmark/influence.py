r"""Curve (b): how much a group of latents moves later frames, against the distance in time.

With $J_{ij} = \partial x_i / \partial z_j$, the influence of latents j on pixels i is the root mean square by which a
pixel of group i moves when the latents of group j are moved by white noise of unit variance,

$$ s_{ij} = \sqrt{\lVert J_{ij} \rVert_F^2 / n_i}, \qquad
   \lVert J_{ij} \rVert_F^2 = \mathbb{E}_{v \sim \mathcal{N}(0, I)} \lVert J_{ij}^\top v \rVert^2 $$

with n_i pixel values in group i. The expectation is Hutchinson's estimator of a trace, of $J_{ij} J_{ij}^\top$: one
backward pass from random cotangents v of group i gives it for all j at once. It has no bias, and its spread is small,
because the trace has thousands of terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..decoding.backprop import Exact
from ..decoding.decode import decode
from .cases import units_of


def measure_influence(vae: nn.Module, latents: Mapping[str, Tensor], probes: int) -> Any:
    """The influence at each distance, for each clip, with the exponential that fits all of them best."""
    clips = {name: influence_of(vae, z, probes) for name, z in latents.items()}
    return {"influence": clips, "fit": exponential_fit(list(clips.values())), "probes": probes}


def influence_of(vae: nn.Module, latents: Tensor, probes: int) -> list[float]:
    """Root mean square over the pairs of groups at distance 0, 1, 2, …"""
    units = units_of(vae, latents)
    generator = torch.Generator(latents.device).manual_seed(0)
    squares: list[list[float]] = [[] for _ in units]
    for i, unit in enumerate(units):
        leaf = latents.detach().requires_grad_()
        indices = range(unit.frames.start, unit.frames.stop)
        pixels = decode(vae, leaf, Exact(checkpoint=False, saturated="pass"), frames=indices)
        for _ in range(probes):
            cotangent = torch.randn(pixels.shape, generator=generator, device=pixels.device, dtype=pixels.dtype)
            gradient = torch.autograd.grad(pixels, leaf, cotangent, retain_graph=True)[0]
            for j in range(i + 1):
                of_group = gradient[:, :, units[j].latents].double().square().sum()
                squares[i - j].append(float(of_group) / pixels.numel())
    return [float(np.sqrt(np.mean(at_distance))) for at_distance in squares]


def exponential_fit(curves: list[list[float]]) -> dict[str, float]:
    """`scale * factor ** distance`, by least squares on the logarithm: each further group leaves `factor` of it."""
    points = [(distance, value) for curve in curves for distance, value in enumerate(curve) if value > 0]
    distances, values = np.array(points).T
    slope, intercept = np.polyfit(distances, np.log(values), 1)
    residual = np.log(values) - (slope * distances + intercept)
    explained = 1 - residual.var() / np.log(values).var()
    return {"scale": float(np.exp(intercept)), "factor": float(np.exp(slope)), "r_squared": float(explained)}

"""Stage `decoder`: the autoencoder's decoder by itself, on whole clips and on latents that are not exact."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .clips import mixed_clip
from .loop import train, trained
from .vae import decode_without_clamp, make_vae

MOST_NOISE = 0.3  # in standard deviations of each latent channel


def train_decoder(work: Path, steps: int) -> None:
    """Train the decoder on, by itself and on whole clips: later groups need it, and latents mean what they did."""
    vae = trained(work, "vae", make_vae())
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder]).train().requires_grad_(True)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        video = torch.stack([mixed_clip(2 * i + (i % 4 == 0)) for i in range(8 * step, 8 * step + 8)]) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = with_noise(vae.encode(video).latent_dist.mode().float())
            output = decode_without_clamp(vae, latents).float()
        squared = (output - video).square().mean()
        return 0.2 * (output - video).abs().mean() + 4 * squared, {"psnr": -10 * math.log10(squared.item() / 4)}

    train("decoder", work, {"decoder": decoder}, steps, 0.005, loss_of_step)


def with_noise(latents: Tensor) -> Tensor:
    """Latents `(B, C, F, H, W)` and noise: its strength is random for each sample, its scale that of each channel.

    A denoiser's latents are not exact, and a decoder that has seen only exact ones turns small errors into coloured
    fringes.
    """
    strength = MOST_NOISE * torch.rand(len(latents), 1, 1, 1, 1)
    return latents + strength * latents.std((0, 2, 3, 4), keepdim=True) * torch.randn_like(latents)


def trained_vae(work: Path, vae: Any) -> Any:
    """The autoencoder with the weights of both its stages."""
    vae = trained(work, "vae", vae)
    if (work / "decoder.pt").exists():
        trained(work, "decoder", nn.ModuleList([vae.post_quant_conv, vae.decoder]))
    return vae

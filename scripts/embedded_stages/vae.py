"""Stage `vae`: AutoencoderKLWan in Wan 2.2's residual, patchified shape."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .clips import FRAMES, mixed_clip
from .loop import train

LATENT_CHANNELS = 32
VAE_CONFIG = {
    "base_dim": 32,
    "decoder_base_dim": 32,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
    "latents_mean": [0.0] * LATENT_CHANNELS,
    "latents_std": [1.0] * LATENT_CHANNELS,
}


def make_vae() -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(**VAE_CONFIG)


def decode_without_clamp(vae: Any, latents: Tensor) -> Tensor:
    """The decoder's raw output: the clamp of `vae.decode` has no gradient at saturated pixels, of which a young
    decoder makes so many that it hardly learns."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    outputs = []
    for i in range(hidden.shape[2]):
        vae._conv_idx = [0]
        outputs.append(
            vae.decoder(hidden[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0)
        )
    vae.clear_cache()
    return unpatchify(torch.cat(outputs, 2), patch_size=vae.config.patch_size)


def vae_batches(step: int, steps: int) -> Tensor:
    """Short clips first, whole ones in the last fifth: three groups already teach most of the recurrence."""
    rng = random.Random(step)
    frames = 9 if step < 0.8 * steps else FRAMES
    batch = []
    for i in range(8):
        start = rng.randint(0, FRAMES - frames)
        batch.append(mixed_clip(step * 8 + i)[:, start : start + frames])
    return torch.stack(batch) * 2 - 1


def train_vae(work: Path, steps: int) -> None:
    vae = make_vae().train()

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        video = vae_batches(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(video).latent_dist
            output = decode_without_clamp(vae, posterior.sample()).float()
        squared = (output - video).square().mean()
        divergence = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float())
        loss = (output - video).abs().mean() + 4 * squared + 3e-5 * divergence.mean()
        psnr = -10 * math.log10(squared.item() / 4)
        return loss, {"psnr": psnr, "kl": divergence.mean().item()}

    train("vae", work, {"vae": vae}, steps, 0.02, loss_of_step)

"""Train the embedded pipeline and its reward from nothing, on procedural videos, and record what they reached.

    python scripts/build_embedded.py                       # all stages, in order; interrupted, it goes on where it was
    python scripts/build_embedded.py vae --work build      # one stage
    python scripts/build_embedded.py evaluate --clips DIR  # figures for the model card, real clips included

Stages: `vae` (AutoencoderKLWan in Wan 2.2's residual, patchified shape), `reward` (open_clip, contrastive), `latents`
(the denoiser's training set, encoded once), `denoiser` (WanTransformer3DModel and its text encoder, flow matching),
`export` (a diffusers folder and an open_clip folder, float16 safetensors), `evaluate` (figures, sample grid, card).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from chopgrad_align.data import procedural

FRAMES, SIZE = 17, 64
LATENT_CHANNELS = 32

VAE_CONFIG = dict(
    base_dim=32,
    decoder_base_dim=32,
    z_dim=LATENT_CHANNELS,
    dim_mult=[1, 2, 2],
    num_res_blocks=1,
    temperal_downsample=[True, True],
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=8,
    scale_factor_temporal=4,
    latents_mean=[0.0] * LATENT_CHANNELS,
    latents_std=[1.0] * LATENT_CHANNELS,
)


# --- a training loop that can be interrupted -------------------------------------------------------------------------


def train(
    name: str,
    work: Path,
    modules: dict[str, nn.Module],
    steps: int,
    learning_rate: float,
    loss_of_step,
    ema_decay: float = 0.999,
    weight_decay: float = 0.0,
) -> dict[str, dict[str, Tensor]]:
    """Adam with warm-up and cosine decay; returns the exponential moving average of each module's weights.

    `loss_of_step(step)` must be a function of the step alone (its data and noise are seeded by it), so that a resumed
    run continues as if it had never stopped. A checkpoint is written every few minutes and at the end.
    """
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    ema = {n: {k: v.detach().clone() for k, v in m.state_dict().items()} for n, m in modules.items()}
    checkpoint, first = work / f"{name}.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for n, module in modules.items():
            module.load_state_dict(state["modules"][n])
        optimizer.load_state_dict(state["optimizer"])
        ema, first = state["ema"], state["step"]

    def save(step: int) -> None:
        state = {"modules": {n: m.state_dict() for n, m in modules.items()}, "optimizer": optimizer.state_dict()}
        torch.save(state | {"ema": ema, "step": step}, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    log = (work / f"{name}.jsonl").open("a")
    saved = time.monotonic()
    averages: dict[str, float] = {}
    for step in (bar := tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=10)):
        torch.manual_seed(step)
        progress = step / steps
        rate = learning_rate * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, metrics = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for n, module in modules.items():
                for k, v in module.state_dict().items():
                    if v.is_floating_point():
                        ema[n][k].lerp_(v, 1 - decay)
        for k, v in {"loss": float(loss), **metrics}.items():
            averages[k] = v if k not in averages else 0.98 * averages[k] + 0.02 * v
        if step % 50 == 49:
            bar.set_postfix({k: f"{v:.4g}" for k, v in averages.items()})
            log.write(json.dumps({"step": step + 1, "rate": rate, **averages}) + "\n")
            log.flush()
        if time.monotonic() - saved > 120:
            save(step + 1)
            saved = time.monotonic()
    if first < steps:
        save(steps)
    return ema


# --- the video autoencoder -------------------------------------------------------------------------------------------


def make_vae():
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(**VAE_CONFIG)


def decode_without_clamp(vae, latents: Tensor) -> Tensor:
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


def mixed_clip(index: int) -> Tensor:
    """Training clip number `index`: even ones are captioned scenes, odd ones dead leaves. `(3, F, H, W)`, [0, 1]."""
    if index % 2:
        return procedural.texture_clip(seed=index, frames=FRAMES, size=SIZE)
    return procedural.render(procedural.random_scene(random.Random(index)), seed=index, frames=FRAMES, size=SIZE)


def vae_batches(step: int, steps: int) -> Tensor:
    """Small crops of a few frames first (7 times cheaper a sample), whole clips in the last part."""
    rng = random.Random(step)
    crops, clip_count, frames, edge = (4, 8, 5, 32) if step < 0.6 * steps else (1, 8, 17, 64)
    batch = []
    for i in range(clip_count):
        clip = mixed_clip(step * 64 + i)
        for _ in range(crops):
            t, y, x = (rng.randint(0, n - k) for n, k in ((FRAMES, frames), (SIZE, edge), (SIZE, edge)))
            crop = clip[:, t : t + frames, y : y + edge, x : x + edge]
            batch.append(crop.flip(3) if rng.random() < 0.5 else crop)
    return torch.stack(batch) * 2 - 1


def train_vae(work: Path, steps: int) -> None:
    vae = make_vae().train()

    def loss_of_step(step: int):
        video = vae_batches(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(video).latent_dist
            output = decode_without_clamp(vae, posterior.sample()).float()
        squared = (output - video).square().mean()
        divergence = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float())
        loss = (output - video).abs().mean() + 4 * squared + 3e-5 * divergence.mean()
        psnr = -10 * math.log10(squared.item() / 4)
        return loss, {"psnr": psnr, "kl": divergence.mean().item()}

    train("vae", work, {"vae": vae}, steps, 1.5e-3, loss_of_step)


STAGES = {"vae": (train_vae, 5000)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="*", choices=[*STAGES, []], help="default: all, in order")
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="checkpoints and logs")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.stage or STAGES:
        run, steps = STAGES[name]
        run(args.work, steps)


if __name__ == "__main__":
    main()

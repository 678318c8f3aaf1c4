"""Stages `denoiser` and `finer`: WanTransformer3DModel and its text encoder, by flow matching on the encoded clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chopgrad_align.common.errors import UsageError

from .clips import FRAMES, SIZE, caption_tokenizer, training_scene
from .decoder import trained_vae
from .latents import load_latents
from .loop import train
from .vae import LATENT_CHANNELS, VAE_CONFIG

DENOISER_CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": 128,
    "freq_dim": 128,
    "ffn_dim": 512,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}
TEXT_LENGTH = 24
CALL = {
    "height": SIZE,
    "width": SIZE,
    "num_frames": FRAMES,
    "num_inference_steps": 16,
    "guidance_scale": 4.0,
    "max_sequence_length": TEXT_LENGTH,
}


def make_pipeline(work: Path, mean: Tensor, std: Tensor, patch: int = 1) -> Any:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = caption_tokenizer()
    torch.manual_seed(2)
    words = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKLWan(**VAE_CONFIG | {"latents_mean": mean.tolist(), "latents_std": std.tolist()})
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(words),
        vae=trained_vae(work, vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=WanTransformer3DModel(**DENOISER_CONFIG | {"patch_size": (1, patch, patch)}),
    )


def train_denoiser(work: Path, steps: int, compiled: bool = False) -> None:
    """On patches of 2x2 latents, a quarter of the tokens: places, colours and motions are learnt cheaply."""
    _flow_matching("denoiser", work, steps, 2, {}, compiled, ema_decay=0.9995)


def train_finer_denoiser(work: Path, steps: int, compiled: bool = False) -> None:
    """The same blocks on single latents: what patches of 16 pixels leave coarse, such as the points of a star."""
    checkpoint = work / "denoiser.pt"
    if not checkpoint.exists():
        raise UsageError(f"{checkpoint} does not exist; run the stage 'denoiser' first")
    start = torch.load(checkpoint, weights_only=True)["ema"]
    start["denoiser"] = _on_single_latents(start["denoiser"])
    _flow_matching("finer", work, steps, 1, start, compiled, ema_decay=0.999)


def _on_single_latents(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights for patches of one latent: embed it as a patch that is constant, predict what a patch has on average."""
    embedding = state["patch_embedding.weight"].sum((-2, -1), keepdim=True)
    mean = {k: state[k].unflatten(0, (-1, LATENT_CHANNELS)).mean(0) for k in ("proj_out.weight", "proj_out.bias")}
    return state | mean | {"patch_embedding.weight": embedding}


def _flow_matching(
    name: str,
    work: Path,
    steps: int,
    patch: int,
    start: dict[str, dict[str, Tensor]],
    compiled: bool,
    ema_decay: float,
    batch: int = 32,
) -> None:
    """Flow matching (Lipman and others, 2022): predict noise - data on the straight line between them."""
    latents = load_latents(work)
    mean, std = latents.float().mean((0, 2, 3, 4)), latents.float().std((0, 2, 3, 4))
    captions = [training_scene(i).caption for i in range(len(latents))]
    pipe = make_pipeline(work, mean, std, patch)
    modules = {"denoiser": pipe.transformer.train(), "text_encoder": pipe.text_encoder.train()}
    for key, state in start.items():
        modules[key].load_state_dict(state)
    denoiser = torch.compile(pipe.transformer) if compiled else pipe.transformer

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = torch.randint(len(latents), (batch,))
        clean = (latents[chosen].float() - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
        drop = torch.rand(batch) < 0.1
        prompts = ["" if no else captions[i] for i, no in zip(chosen.tolist(), drop.tolist(), strict=True)]
        # The pipeline pads texts with zeros to a length that its caller chooses: the model must not mind which.
        length = 512 if step % 20 == 0 else TEXT_LENGTH
        sigma = torch.sigmoid(torch.randn(batch) + 0.5).view(-1, 1, 1, 1, 1)
        noise = torch.randn_like(clean)
        with torch.autocast("cpu", torch.bfloat16):
            text = pipe._get_t5_prompt_embeds(prompts, max_sequence_length=length)
            noisy = (1 - sigma) * clean + sigma * noise
            velocity = denoiser(noisy, 1000 * sigma.flatten(), text, return_dict=False)[0]
        return (velocity.float() - (noise - clean)).square().mean(), {}

    train(name, work, modules, steps, 0.02, loss_of_step, ema_decay=ema_decay)

"""Train the embedded pipeline and its reward from nothing, on procedural videos, and record what they reached.

    python scripts/build_embedded.py                       # all stages, in order; interrupted, it goes on where it was
    python scripts/build_embedded.py vae --work DIR        # one stage
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from chopgrad_align.data import procedural
from chopgrad_align.reward import Reward

FRAMES, SIZE = 17, 64
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


# --- a training loop that can be interrupted -------------------------------------------------------------------------


def train(
    name: str,
    work: Path,
    modules: dict[str, nn.Module],
    steps: int,
    learning_rate: float,
    loss_of_step: Callable[[int], tuple[Tensor, dict[str, float]]],
    ema_decay: float = 0.999,
    weight_decay: float = 0.0,
) -> dict[str, dict[str, Tensor]]:
    """Muon for matrices, Adam for the rest; returns the exponential moving average of each module's weights.

    Muon (Jordan and others, 2024) orthogonalises the update of each weight matrix; a convolution counts as the matrix
    (output channels, everything else). On the small autoencoder it needed less than half of Adam's steps.

    `loss_of_step(step)` must be a function of the step alone (its data and noise are seeded by it), so that a resumed
    run continues as if it had never stopped. A checkpoint is written every few minutes and at the end.
    """
    parameters = [p for module in modules.values() for p in module.parameters()]
    matrices = [p for p in parameters if p.dim() >= 2 and min(p.shape[0], p[0].numel()) > 16]
    views = [nn.Parameter(p.detach().view(p.shape[0], -1)) for p in matrices]  # share the storage of the weights
    others = [p for p in parameters if all(p is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(views, lr=learning_rate, weight_decay=weight_decay),
        torch.optim.Adam(others, lr=0.1 * learning_rate, betas=(0.9, 0.99)),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    ema = {n: {k: v.detach().clone() for k, v in m.state_dict().items()} for n, m in modules.items()}
    checkpoint, first = work / f"{name}.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for n, module in modules.items():
            module.load_state_dict(state["modules"][n])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        ema, first = state["ema"], state["step"]

    def save(step: int) -> None:
        state: dict[str, Any] = {"modules": {n: m.state_dict() for n, m in modules.items()}}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        torch.save(state | {"ema": ema, "step": step}, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    log = (work / f"{name}.jsonl").open("a")
    saved = time.monotonic()
    averages: dict[str, float] = {}
    for step in (bar := tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=10)):
        torch.manual_seed(step)
        progress = step / steps
        rate = min(1.0, (step + 1) / 50, (1 - progress) / 0.5 + 0.01)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
        loss, metrics = loss_of_step(step)
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for view, matrix in zip(views, matrices, strict=True):
            view.grad = None if matrix.grad is None else matrix.grad.view_as(view)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for n, module in modules.items():
                for k, v in module.state_dict().items():
                    if v.is_floating_point():
                        ema[n][k].lerp_(v, 1 - decay)
        for k, v in {"loss": loss.item(), **metrics}.items():
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


def mixed_clip(index: int) -> Tensor:
    """Training clip number `index`: even ones are captioned scenes, odd ones dead leaves. `(3, F, H, W)`, [0, 1]."""
    if index % 2:
        return procedural.texture_clip(seed=index, frames=FRAMES, size=SIZE)
    return procedural.render(procedural.random_scene(random.Random(index)), seed=index, frames=FRAMES, size=SIZE)


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


def train_decoder(work: Path, steps: int) -> None:
    """Train the decoder on, by itself and on whole clips: later groups need it, and latents stay what they are."""
    vae = trained(work, "vae", make_vae())
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder]).train().requires_grad_(True)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        video = torch.stack([mixed_clip(2 * i + (i % 4 == 0)) for i in range(8 * step, 8 * step + 8)]) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(video).latent_dist.mode()
            output = decode_without_clamp(vae, latents).float()
        squared = (output - video).square().mean()
        return 0.2 * (output - video).abs().mean() + 4 * squared, {"psnr": -10 * math.log10(squared.item() / 4)}

    train("decoder", work, {"decoder": decoder}, steps, 0.005, loss_of_step)


def trained_vae(work: Path, vae: Any) -> Any:
    """The autoencoder with the weights of both its stages."""
    vae = trained(work, "vae", vae)
    if (work / "decoder.pt").exists():
        trained(work, "decoder", nn.ModuleList([vae.post_quant_conv, vae.decoder]))
    return vae


# --- words -----------------------------------------------------------------------------------------------------------


def make_tokenizer() -> Any:
    """Word level; [EOS] has the highest id, because open_clip reads a text's embedding at its highest id."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for scene in procedural.all_scenes() for word in scene.caption.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words, "[EOS]"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", vocabulary["[EOS]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=512
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    fields = json.loads(config.read_text())
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of transformers knows
    config.write_text(json.dumps(fields, indent=2) + "\n")


# --- the reward ------------------------------------------------------------------------------------------------------

REWARD_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 24, "width": 128, "heads": 4, "layers": 2, "hf_tokenizer_name": "embedded"},
}
REWARD_MEAN, REWARD_STD = [0.5] * 3, [0.5] * 3


def make_reward(tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    import copy

    from open_clip.model import CLIP

    torch.manual_seed(1)
    config = copy.deepcopy(REWARD_CONFIG)
    config["text_cfg"]["vocab_size"] = len(tokenizer)
    return CLIP(**config), config


def reward_batch(step: int, size: int) -> tuple[Tensor, list[str]]:
    """One frame each of `size` scenes, degraded at random: a reward that has seen only clean renderings is blind to
    what a generator does, and its gradient is noise there."""
    rng = random.Random(step)
    frames, captions = [], []
    for i in range(size):
        scene = procedural.random_scene(rng)
        at = rng.randrange(FRAMES)
        frame = procedural.render(scene, seed=step * size + i, frames=FRAMES, size=SIZE, only=slice(at, at + 1))[:, 0]
        if rng.random() < 0.6:
            blurred = F.avg_pool2d(frame[None], 3, 1, 1, count_include_pad=False)[0]
            frame = torch.lerp(frame, blurred, rng.random())
        if rng.random() < 0.5:
            frame = frame + 0.12 * rng.random() * torch.randn_like(frame)
        if rng.random() < 0.5:
            frame = (frame - 0.5) * rng.uniform(0.8, 1.1) + 0.5 + rng.uniform(-0.06, 0.06)
        frames.append(frame.clamp(0, 1))
        captions.append(scene.caption)
    return torch.stack(frames), captions


def train_reward(work: Path, steps: int) -> None:
    tokenizer = make_tokenizer()
    model, _ = make_reward(tokenizer)
    model.train()

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        frames, captions = reward_batch(step, 128)
        text = tokenizer(captions, padding="max_length", max_length=24, return_tensors="pt").input_ids
        with torch.autocast("cpu", torch.bfloat16):
            image, words = model.encode_image((frames - 0.5) / 0.5), model.encode_text(text)
        image, words = F.normalize(image.float(), dim=-1), F.normalize(words.float(), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * image @ words.T
        target = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        accuracy = (logits.argmax(1) == target).float().mean().item()
        return loss, {"accuracy": accuracy, "scale": model.logit_scale.exp().item()}

    train("reward", work, {"reward": model}, steps, 0.01, loss_of_step)


# --- the denoiser ----------------------------------------------------------------------------------------------------

DENOISER_CONFIG = {
    "patch_size": (1, 2, 2),
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
TRAINING_CLIPS = 12000
TEXT_LENGTH = 24
CALL = {
    "height": SIZE,
    "width": SIZE,
    "num_frames": FRAMES,
    "num_inference_steps": 16,
    "guidance_scale": 4.0,
    "max_sequence_length": TEXT_LENGTH,
}


def trained(work: Path, name: str, module: Any, key: str | None = None) -> Any:
    """The module with the averaged weights of its stage."""
    checkpoint = work / f"{name}.pt"
    if not checkpoint.exists():
        raise SystemExit(f"error: {checkpoint} does not exist; run the stage '{name}' first")
    module.load_state_dict(torch.load(checkpoint, weights_only=True)["ema"][key or name])
    return module.eval().requires_grad_(False)


def training_scene(index: int) -> procedural.Scene:
    return procedural.random_scene(random.Random(f"denoiser {index}"))


@torch.no_grad()
def encode_latents(work: Path, count: int) -> None:
    """Encode the denoiser's training clips, in shards, so that an interrupted encoding goes on."""
    vae = trained(work, "vae", make_vae())
    shard = min(500, count)
    for start in tqdm(range(0, count, shard), desc="latents"):
        path = work / f"latents-{start:06d}.pt"
        if path.exists():
            continue
        means = []
        for first in range(start, start + shard, 20):
            indices = range(first, first + 20)
            clips = [procedural.render(training_scene(i), seed=i, frames=FRAMES, size=SIZE) for i in indices]
            with torch.autocast("cpu", torch.bfloat16):
                means.append(vae.encode(torch.stack(clips) * 2 - 1).latent_dist.mode().half())
        torch.save(torch.cat(means), path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)


def load_latents(work: Path) -> Tensor:
    return torch.cat([torch.load(path, weights_only=True) for path in sorted(work.glob("latents-*.pt"))])


def make_pipeline(work: Path, mean: Tensor, std: Tensor) -> Any:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = make_tokenizer()
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
        transformer=WanTransformer3DModel(**DENOISER_CONFIG),
    )


def train_denoiser(work: Path, steps: int, batch: int = 32) -> None:
    """Flow matching (Lipman and others, 2022): predict noise - data on the straight line between them."""
    latents = load_latents(work)
    mean, std = latents.float().mean((0, 2, 3, 4)), latents.float().std((0, 2, 3, 4))
    captions = [training_scene(i).caption for i in range(len(latents))]
    pipe = make_pipeline(work, mean, std)
    denoiser, text_encoder = pipe.transformer.train(), pipe.text_encoder.train()

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

    train(
        "denoiser",
        work,
        {"denoiser": denoiser, "text_encoder": text_encoder},
        steps,
        0.02,
        loss_of_step,
        ema_decay=0.9995,
    )


# --- export and evaluation -------------------------------------------------------------------------------------------

EMBEDDED = Path(__file__).parent.parent / "chopgrad_align" / "embedded"


def export(work: Path, _: int) -> None:
    """Write the diffusers folder, the open_clip folder and the prompt files, in float16."""
    from safetensors.torch import save_file

    latents = load_latents(work).float()
    pipe = make_pipeline(work, latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)))
    trained(work, "denoiser", pipe.transformer)
    trained(work, "denoiser", pipe.text_encoder, "text_encoder")
    folder = EMBEDDED / "pipeline"
    pipe.to(torch.float16).save_pretrained(folder)
    save_tokenizer(pipe.tokenizer, folder / "tokenizer")
    (folder / "call_defaults.json").write_text(json.dumps(CALL, indent=2) + "\n")

    tokenizer = make_tokenizer()
    reward, config = make_reward(tokenizer)
    trained(work, "reward", reward)
    folder = EMBEDDED / "reward"
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": REWARD_MEAN, "std": REWARD_STD, "interpolation": "bicubic", "resize_mode": "squash"}
    fields = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    state = {name: value.half().contiguous() for name, value in reward.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    save_tokenizer(tokenizer, folder)

    rng = random.Random("prompts")
    for name, count, held_out in (("prompts_train.txt", 512, False), ("prompts_held_out.txt", 64, True)):
        captions = {procedural.random_scene(rng, held_out).caption: None for _ in range(2 * count)}
        (EMBEDDED / name).write_text("\n".join(list(captions)[:count]) + "\n")


def psnr(video: Tensor, other: Tensor) -> float:
    """Of videos in [0, 1], in dB."""
    return -10 * math.log10((video - other).square().mean().item())


def reconstruction(vae: Any, clips: list[Tensor]) -> tuple[float, list[Tensor]]:
    """Mean PSNR over clips `(3, F, H, W)`, and the reconstructions."""
    outputs = []
    for clip in clips:
        latents = vae.encode(clip[None] * 2 - 1).latent_dist.mode()
        outputs.append((vae.decode(latents).sample[0] + 1) / 2)
    return sum(map(psnr, clips, outputs)) / len(clips), outputs


def real_clips(folder: Path) -> list[Tensor]:
    """Every video of a folder, cropped to a square and area-resized, in clips of the pipeline's length."""
    from chopgrad_align.data.video import read_video

    clips = []
    for path in sorted(folder.glob("*.mp4")):
        video, _ = read_video(path)
        height, width = video.shape[-2:]
        edge = min(height, width)
        top, left = (height - edge) // 2, (width - edge) // 2
        video = F.interpolate(video[:, :, top : top + edge, left : left + edge], (SIZE, SIZE), mode="area")
        clips += [video[i : i + FRAMES].transpose(0, 1) for i in range(0, len(video) - FRAMES + 1, FRAMES)]
    return clips


def retrieval(reward: Reward, videos: list[Tensor], scenes: list[procedural.Scene], choices: int = 32) -> float:
    """How often the reward scores a video `(F, 3, H, W)` highest with its own caption, of 32 held-out ones."""
    rng, right = random.Random("choices"), 0
    for video, scene in zip(videos, scenes, strict=True):
        captions = [scene.caption]
        while len(captions) < choices:
            other = procedural.random_scene(rng, held_out=True).caption
            if other not in captions:
                captions.append(other)
        scores = reward(video[None].expand(choices, -1, -1, -1, -1), captions)
        right += int(scores.argmax()) == 0
    return right / len(videos)


@torch.no_grad()
def evaluate(work: Path, count: int, clips: Path | None = None) -> None:
    """Measure the exported folders as a user would load them; write figures, a sample grid and the model card."""
    from diffusers import DiffusionPipeline

    from chopgrad_align import load_reward
    from chopgrad_align.evaluation.sheet import contact_sheet

    pipe = DiffusionPipeline.from_pretrained(EMBEDDED / "pipeline", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    reward = load_reward("clip_score", frames=4, frames_per_chunk=128)
    rng = random.Random("evaluation")
    scenes = [procedural.random_scene(rng, held_out=True) for _ in range(count)]
    rendered = [procedural.render(scene, seed=10**9 + i, frames=FRAMES, size=SIZE) for i, scene in enumerate(scenes)]

    figures: dict[str, float] = {}
    figures["psnr_procedural_db"], _ = reconstruction(pipe.vae, rendered)
    if clips is not None:
        figures["psnr_real_db"], _ = reconstruction(pipe.vae, real_clips(clips))
    figures["retrieval_rendered"] = retrieval(reward, [clip.transpose(0, 1) for clip in rendered], scenes)
    generated = []
    for start in tqdm(range(0, count, 8), desc="generate"):
        chosen = scenes[start : start + 8]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(chosen))]
        prompts = [scene.caption for scene in chosen]
        generated += list(pipe(prompts, generator=generators, **CALL, output_type="pt").frames)
    figures["retrieval_generated"] = retrieval(reward, generated, scenes)
    figures["videos"] = count
    figures["megabytes"] = sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) / 1e6

    print(json.dumps(figures, indent=2))
    (EMBEDDED / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    columns = {"rendered": [clip.transpose(0, 1) for clip in rendered[:8]], "generated": generated[:8]}
    contact_sheet(columns, [scene.caption for scene in scenes[:8]]).save(work / "samples.png")
    write_card(figures)


def write_card(figures: dict[str, float]) -> None:
    real_text = f"{figures['psnr_real_db']:.1f} dB PSNR" if "psnr_real_db" in figures else "not measured"
    lines = [
        "# The embedded pipeline and its reward",
        "",
        "`pipeline/` is a diffusers folder (WanPipeline: AutoencoderKLWan in Wan 2.2's residual, patchified shape,",
        "WanTransformer3DModel, a UMT5 encoder with a word-level tokenizer): text to video, 17 frames at 64x64.",
        "`reward/` is an open_clip folder that scores frames against captions. Both were trained from nothing by",
        "`scripts/build_embedded.py` on videos made by `chopgrad_align.data.procedural`; a tenth of the captions,",
        "chosen by a hash of their text, was held out. Licence: that of the package.",
        "",
        f"Measured by `scripts/build_embedded.py evaluate` on {figures['videos']} held-out captions (32 choices):",
        "",
        "| figure | value |",
        "|---|---|",
        f"| reconstruction of unseen procedural videos | {figures['psnr_procedural_db']:.1f} dB PSNR |",
        f"| reconstruction of real clips at the same size | {real_text} |",
        f"| right caption of a rendered video | {figures['retrieval_rendered']:.0%} |",
        f"| right caption of a generated video | {figures['retrieval_generated']:.0%} |",
        f"| size of all files | {figures['megabytes']:.1f} MB |",
        "",
        "Not for any use but tests, examples and benchmarks: it knows nine colours, eight shapes and nine motions.",
    ]
    (EMBEDDED / "README.md").write_text("\n".join(lines) + "\n")


STAGES = {
    "vae": (train_vae, 2400),
    "decoder": (train_decoder, 300),
    "reward": (train_reward, 1000),
    "latents": (encode_latents, TRAINING_CLIPS),
    "denoiser": (train_denoiser, 3600),
    "export": (export, 0),
    "evaluate": (evaluate, 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="*", help=f"of {', '.join(STAGES)}; default: all, in order")
    parser.add_argument("--work", type=Path, default=Path("runs/build_embedded"), help="checkpoints and logs")
    parser.add_argument("--clips", type=Path, help="folder of real mp4 files, for `evaluate`")
    args = parser.parse_args()
    if unknown := set(args.stage) - set(STAGES):
        parser.error(f"unknown stage {', '.join(unknown)}; expected some of {', '.join(STAGES)}")
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.stage or STAGES:
        run, count = STAGES[name]
        run(args.work, count, **({"clips": args.clips} if name == "evaluate" else {}))


if __name__ == "__main__":
    main()

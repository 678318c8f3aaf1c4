"""Pipelines that have their transformer for themselves: Allegro, EasyAnimate, Latte, Mochi, Motif."""

from __future__ import annotations

import functools

import diffusers
import tiny_parts as parts
import torch
from tiny_vaes import allegro_vae, image_vae, magvit_vae, mochi_vae, wan_vae

from .entry import Entry

_CALL = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0}
_PROMPT = {"prompt": parts.TEXT}


def _euler():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def _allegro():
    """Its tiles have 24 frames and more than 120 pixels a side, however small its networks are."""
    torch.manual_seed(0)
    return parts.frozen(
        diffusers.AllegroPipeline(
            tokenizer=parts.tokenizer(),
            text_encoder=parts.t5(),
            vae=allegro_vae(tiles=False),
            transformer=diffusers.AllegroTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                num_layers=2,
                cross_attention_dim=24,
                caption_channels=8,
                sample_height=4,
                sample_width=4,
                sample_frames=4,
            ),
            scheduler=diffusers.EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear"),
        )
    )


def _latte():
    torch.manual_seed(0)
    return parts.frozen(
        diffusers.LattePipeline(
            tokenizer=parts.tokenizer(128),
            text_encoder=parts.t5(),
            vae=image_vae(),
            transformer=diffusers.LatteTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                out_channels=8,
                num_layers=2,
                cross_attention_dim=16,
                attention_bias=True,
                sample_size=8,
                patch_size=2,
                activation_fn="gelu-approximate",
                num_embeds_ada_norm=1000,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
                caption_channels=8,
                video_length=4,
            ),
            scheduler=diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
        )
    )


def _mochi():
    torch.manual_seed(0)
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=8,
        in_channels=12,
        text_embed_dim=8,
        time_embed_dim=8,
        max_sequence_length=16,
    )
    torch.nn.init.normal_(transformer.pos_frequencies, std=0.1)  # which are made empty, to be loaded
    return parts.frozen(
        diffusers.MochiPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=mochi_vae(latent_channels=12),  # as many as its config has means of
            text_encoder=parts.t5(),
            tokenizer=parts.tokenizer(),
            transformer=transformer,
        )
    )


def _easyanimate(pipeline: str, in_channels: int = 4, **changes):
    torch.manual_seed(0)
    return parts.frozen(
        getattr(diffusers, pipeline)(
            vae=magvit_vae(spatial_group_norm=False),
            text_encoder=parts.qwen_vl(),
            tokenizer=parts.chat_tokenizer(),
            transformer=diffusers.EasyAnimateTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=in_channels,
                out_channels=4,
                patch_size=2,
                sample_width=4,
                sample_height=4,
                num_layers=2,
                time_embed_dim=8,
                text_embed_dim=8,
                **changes,
            ),
            scheduler=_euler(),
        )
    )


def _motif(pipeline: str, image: bool = False):
    from diffusers.guiders import AdaptiveProjectedGuidance
    from transformers import SiglipImageProcessor, SiglipVisionConfig, T5Gemma2EncoderConfig, T5Gemma2TextConfig
    from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder

    torch.manual_seed(0)
    text = T5Gemma2TextConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=64,
        max_position_embeddings=512,
        head_dim=4,
        num_key_value_heads=2,
        dropout_rate=0.0,
    )
    vision = SiglipVisionConfig(
        hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    return parts.frozen(
        getattr(diffusers, pipeline)(
            scheduler=_euler(),
            vae=wan_vae(),
            text_encoder=T5Gemma2Encoder(T5Gemma2EncoderConfig(text_config=text, vision_config=vision)),
            tokenizer=parts.tokenizer(512),
            transformer=diffusers.MotifVideoTransformer3DModel(
                in_channels=9,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=12,
                num_layers=1,
                num_single_layers=1,
                patch_size=1,
                text_embed_dim=8,
                image_embed_dim=4 if image else None,
                rope_axes_dim=(4, 4, 4),
            ),
            guider=AdaptiveProjectedGuidance(guidance_scale=3.0),
            feature_extractor=SiglipImageProcessor(size={"height": 16, "width": 16}) if image else None,
        )
    )


_MASK = torch.zeros(1, 1, 5, 16, 16).index_fill(4, torch.arange(8), 1.0)
_EASYANIMATE = {**_CALL, "num_frames": 5, "negative_prompt": ""}  # without which its guidance fails
_MOTIF = {"height": 16, "width": 16, "num_inference_steps": 2, "num_frames": 5, "max_sequence_length": 16}

ENTRIES = {
    "AllegroPipeline": Entry(
        _allegro, {**_CALL, "height": 128, "width": 128, "num_frames": 24, "max_sequence_length": 16}, _PROMPT
    ),
    "LattePipeline": Entry(_latte, {**_CALL, "video_length": 4, "clean_caption": False}, _PROMPT),
    "MochiPipeline": Entry(_mochi, {**_CALL, "num_frames": 7, "max_sequence_length": 16}, _PROMPT),
    "EasyAnimatePipeline": Entry(functools.partial(_easyanimate, "EasyAnimatePipeline"), _EASYANIMATE, _PROMPT),
    "EasyAnimateControlPipeline": Entry(
        functools.partial(_easyanimate, "EasyAnimateControlPipeline", in_channels=12),
        _EASYANIMATE,
        {**_PROMPT, "control_video": parts.clip(5)},
        fault="its call passes `encode_prompt` an argument that it does not have, `text_encoder_index`",
    ),
    "EasyAnimateInpaintPipeline": Entry(
        # With the mask resized instead of encoded, it reads a setting of the VAE that diffusers' class does not have.
        functools.partial(
            _easyanimate, "EasyAnimateInpaintPipeline", in_channels=12, resize_inpaint_mask_directly=False
        ),
        _EASYANIMATE,
        {**_PROMPT, "video": parts.tensor(parts.clip(5)), "mask_video": _MASK},
    ),
    "MotifVideoPipeline": Entry(functools.partial(_motif, "MotifVideoPipeline"), _MOTIF, _PROMPT),
    "MotifVideoImage2VideoPipeline": Entry(
        functools.partial(_motif, "MotifVideoImage2VideoPipeline", image=True),
        _MOTIF,
        {**_PROMPT, "image": parts.image()},
    ),
}

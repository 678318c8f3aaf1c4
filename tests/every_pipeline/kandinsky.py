"""Kandinsky 5 and 6: text-to-video, image-to-video, with sound, and super-resolution."""

from __future__ import annotations

import functools

import diffusers
import tiny_parts as parts
import torch
from tiny_vaes import hunyuan_video_vae, kandinsky6_sr_vae

from .entry import Entry

_CALL = {
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "max_sequence_length": 16,
}
_PROMPT = {"prompt": parts.TEXT}
_IMAGE = {**_PROMPT, "image": parts.image()}
_TRANSFORMER = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 8,
    "in_text_dim2": 8,
    "time_dim": 8,
    "model_dim": 12,
    "ff_dim": 16,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (2, 2, 2),
}
_TARGETS = ("to_query", "to_key", "to_value")


def _encoders():
    return {
        "text_encoder": parts.qwen_vl(),
        "tokenizer": parts.qwen_processor(),
        "text_encoder_2": parts.clip_text(),
        "tokenizer_2": parts.tokenizer(),
    }


def _kandinsky5(pipeline: str, image: bool = False):
    torch.manual_seed(0)
    return parts.frozen(
        getattr(diffusers, pipeline)(
            transformer=parts.without_zeros(diffusers.Kandinsky5Transformer3DModel(**_TRANSFORMER, visual_cond=image)),
            vae=hunyuan_video_vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            **_encoders(),
        )
    )


def _kandinsky6():
    torch.manual_seed(0)
    return parts.frozen(
        diffusers.Kandinsky6TI2VAPipeline(
            transformer=parts.without_zeros(
                diffusers.Kandinsky6Transformer3DModel(
                    **_TRANSFORMER,
                    in_audio_dim=4,
                    out_audio_dim=4,
                    model_dim_a=12,
                    time_dim_a=8,
                    ff_dim_a=16,
                    axes_dims_a=(2, 2, 2),
                    visual_token_type_num_embeddings=2,
                )
            ),
            vae=hunyuan_video_vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            audio_vae=diffusers.MMAudioVAE(
                mel_bins=8, latent_channels=4, hidden_channels=8, channel_multipliers=(1, 2), layers_per_block=1
            ),
            vocoder=diffusers.MMAudioVocoder(
                num_mels=8,
                upsample_initial_channel=8,
                upsample_rates=(2, 2),
                upsample_kernel_sizes=(4, 4),
                resblock_kernel_sizes=(3,),
                resblock_dilation_sizes=((1, 3, 5),),
            ),
            **_encoders(),
        )
    )


def _kandinsky6_sr():
    torch.manual_seed(0)
    return parts.frozen(
        diffusers.Kandinsky6SRPipeline(
            transformer=parts.without_zeros(
                diffusers.Kandinsky6SRTransformer3DModel(
                    in_visual_dim=4,
                    out_visual_dim=4,
                    time_dim=8,
                    model_dim=12,
                    ff_dim=16,
                    num_visual_blocks=2,
                    axes_dims=(2, 2, 2),
                    tile_sizes=((32, 32),),
                )
            ),
            vae=kandinsky6_sr_vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    )


ENTRIES = {
    "Kandinsky5T2VPipeline": Entry(
        functools.partial(_kandinsky5, "Kandinsky5T2VPipeline"), _CALL, _PROMPT, targets=_TARGETS
    ),
    "Kandinsky5I2VPipeline": Entry(
        functools.partial(_kandinsky5, "Kandinsky5I2VPipeline", image=True),
        {**_CALL, "num_frames": 17},
        _IMAGE,
        targets=_TARGETS,
    ),
    "Kandinsky6TI2VAPipeline": Entry(_kandinsky6, _CALL, _PROMPT, targets=_TARGETS),
    "Kandinsky6TI2VAPipeline/image": Entry(_kandinsky6, {**_CALL, "sample_audio": False}, _IMAGE, targets=_TARGETS),
    "Kandinsky6SRPipeline": Entry(
        _kandinsky6_sr,
        {"num_inference_steps": 2, "resolution_scale": 2},
        {"video": parts.clip(5)},
        targets=_TARGETS,
    ),
}

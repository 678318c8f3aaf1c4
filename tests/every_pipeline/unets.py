"""Pipelines on image UNets with temporal layers: AnimateDiff, PIA, I2VGen-XL, ModelScope's text-to-video, SVD."""

from __future__ import annotations

import functools

import diffusers
import tiny_parts as parts
import tiny_pipelines
import torch
from tiny_vaes import image_vae

from .entry import Entry

_SIZE = {"height": 16, "width": 16, "num_inference_steps": 2}
_CALL = {**_SIZE, "num_frames": 3, "guidance_scale": 3.0}
_VIDEO = {"prompt": parts.TEXT, "video": parts.clip(3)}
_FRAMES = parts.clip(3, seed=9)
_CHANNELS = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8}


def _ddim():
    return diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)


def _motion_unet(**changes):
    settings = {
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        "num_attention_heads": 2,
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 8,
        "sample_size": 8,
    }
    return diffusers.UNetMotionModel(**{**_CHANNELS, **settings, **changes})


def _motion_adapter():
    """Not used beside a UNet that has its layers, but looked for by diffusers when it loads a pipeline."""
    return diffusers.MotionAdapter(
        block_out_channels=(8, 8), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )


def _controlnet():
    return diffusers.ControlNetModel(
        **_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        attention_head_dim=2,
        conditioning_embedding_out_channels=(4, 8),
    )


def _sparse_controlnet():
    return diffusers.SparseControlNetModel(
        **_CHANNELS,
        conditioning_channels=3,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        attention_head_dim=2,
        motion_num_attention_heads=2,
        conditioning_embedding_out_channels=(4, 8),
        use_simplified_condition_embedding=False,
    )


def _animatediff(name: str, control=None, **unet):
    torch.manual_seed(0)
    return parts.frozen(
        getattr(diffusers, name)(
            vae=image_vae(),
            text_encoder=parts.clip_text(),
            tokenizer=parts.tokenizer(),
            unet=_motion_unet(**unet),
            motion_adapter=_motion_adapter(),
            scheduler=_ddim(),
            **({} if control is None else {"controlnet": parts.without_zeros(control())}),
        )
    )


def _animatediff_sdxl():
    torch.manual_seed(0)
    return parts.frozen(
        diffusers.AnimateDiffSDXLPipeline(
            vae=image_vae(),
            text_encoder=parts.clip_text(),
            text_encoder_2=parts.clip_text(projection=True),
            tokenizer=parts.tokenizer(),
            tokenizer_2=parts.tokenizer(),
            unet=_motion_unet(
                cross_attention_dim=16,  # the two text encoders' widths together
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=6 * 4 + 8,
            ),
            motion_adapter=_motion_adapter(),
            scheduler=_ddim(),
        )
    )


def _i2vgen_xl():
    torch.manual_seed(0)
    image_encoder, feature_extractor = parts.clip_vision()
    return parts.frozen(
        diffusers.I2VGenXLPipeline(
            vae=image_vae(),
            text_encoder=parts.clip_text(),
            tokenizer=parts.tokenizer(),
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            unet=diffusers.I2VGenXLUNet(
                **_CHANNELS,
                down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
                up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
                attention_head_dim=2,
                sample_size=8,
            ),
            scheduler=_ddim(),
        )
    )


def _model_scope(name: str):
    torch.manual_seed(0)
    return parts.frozen(
        getattr(diffusers, name)(
            vae=image_vae(),
            text_encoder=parts.clip_text(),
            tokenizer=parts.tokenizer(),
            unet=diffusers.UNet3DConditionModel(
                **_CHANNELS,
                down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
                up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
                attention_head_dim=2,
                sample_size=8,
            ),
            scheduler=_ddim(),
        )
    )


_TO_VIDEO = {key: value for key, value in _CALL.items() if key != "num_frames"}
_PROMPT = {"prompt": parts.TEXT}

ENTRIES = {
    "AnimateDiffPipeline": Entry(functools.partial(_animatediff, "AnimateDiffPipeline"), _CALL, _PROMPT),
    "AnimateDiffPAGPipeline": Entry(
        functools.partial(_animatediff, "AnimateDiffPAGPipeline"), {**_CALL, "pag_scale": 2.0}, _PROMPT
    ),
    "AnimateDiffSDXLPipeline": Entry(_animatediff_sdxl, _CALL, _PROMPT),
    "AnimateDiffControlNetPipeline": Entry(
        functools.partial(_animatediff, "AnimateDiffControlNetPipeline", _controlnet),
        _CALL,
        {**_PROMPT, "conditioning_frames": _FRAMES},
    ),
    "AnimateDiffSparseControlNetPipeline": Entry(
        functools.partial(_animatediff, "AnimateDiffSparseControlNetPipeline", _sparse_controlnet),
        {**_CALL, "controlnet_frame_indices": [0, 2]},
        {**_PROMPT, "conditioning_frames": _FRAMES[:2]},
    ),
    "AnimateDiffVideoToVideoPipeline": Entry(
        functools.partial(_animatediff, "AnimateDiffVideoToVideoPipeline"),
        {**_TO_VIDEO, "num_inference_steps": 4, "strength": 0.5},
        _VIDEO,
    ),
    "AnimateDiffVideoToVideoControlNetPipeline": Entry(
        functools.partial(_animatediff, "AnimateDiffVideoToVideoControlNetPipeline", _controlnet),
        {**_TO_VIDEO, "num_inference_steps": 4, "strength": 0.5},
        {**_VIDEO, "conditioning_frames": _FRAMES},
    ),
    "PIAPipeline": Entry(
        functools.partial(_animatediff, "PIAPipeline", in_channels=9), _CALL, {**_PROMPT, "image": parts.image()}
    ),
    # The default clip_skip=1 reads an attribute that CLIPTextModel of transformers 5 does not have.
    "I2VGenXLPipeline": Entry(_i2vgen_xl, {**_CALL, "clip_skip": None}, {**_PROMPT, "image": parts.image(size=32)}),
    "TextToVideoSDPipeline": Entry(functools.partial(_model_scope, "TextToVideoSDPipeline"), _CALL, _PROMPT),
    "VideoToVideoSDPipeline": Entry(
        functools.partial(_model_scope, "VideoToVideoSDPipeline"),
        {"num_inference_steps": 4, "strength": 0.5, "guidance_scale": 3.0},
        _VIDEO,
    ),
    "StableVideoDiffusionPipeline": Entry(
        tiny_pipelines.svd, {**_SIZE, "num_frames": 4, "decode_chunk_size": 2}, {"image": parts.image()}
    ),
}

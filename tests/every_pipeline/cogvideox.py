"""CogVideoX, and ConsisID, which is made from it."""

from __future__ import annotations

import functools

import diffusers
import tiny_parts as parts
import tiny_pipelines
import torch
from tiny_vaes import cogvideox_vae

from .entry import Entry

_SIZE = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0, "max_sequence_length": 16}
_CALL = {**_SIZE, "num_frames": 9}
_PROMPT = {"prompt": parts.TEXT}
_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,  # at least, for rotary embeddings of three axes
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 8,
    "num_layers": 2,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 9,
    "max_text_seq_length": 16,
}


def _components(transformer):
    return {
        "tokenizer": parts.tokenizer(),
        "text_encoder": parts.t5(),
        "vae": cogvideox_vae(),
        "transformer": transformer,
        "scheduler": diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        ),
    }


def _made(pipeline: str, **changes):
    torch.manual_seed(0)
    transformer = diffusers.CogVideoXTransformer3DModel(**{**_TRANSFORMER, **changes})
    return parts.frozen(getattr(diffusers, pipeline)(**_components(transformer)))


def _consisid():
    torch.manual_seed(0)
    transformer = diffusers.ConsisIDTransformer3DModel(
        **{**_TRANSFORMER, "in_channels": 8},
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=4,
        cross_attn_num_heads=2,
        LFE_id_dim=4,
        LFE_vit_dim=4,
        LFE_depth=5,
        LFE_dim_head=4,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=1,
        LFE_output_dim=21,  # two thirds of the width
        LFE_ff_mult=1,
        LFE_num_scale=1,
    )
    return parts.frozen(diffusers.ConsisIDPipeline(**_components(transformer)))


ENTRIES = {
    "CogVideoXPipeline": Entry(tiny_pipelines.cogvideox, {**_CALL, "max_sequence_length": 226}, _PROMPT),
    "CogVideoXPipeline/1.5": Entry(
        functools.partial(
            _made, "CogVideoXPipeline", patch_size_t=2, use_rotary_positional_embeddings=True, patch_bias=False
        ),
        _CALL,
        _PROMPT,
    ),
    "CogVideoXImageToVideoPipeline": Entry(
        functools.partial(_made, "CogVideoXImageToVideoPipeline", in_channels=8, use_rotary_positional_embeddings=True),
        _CALL,
        {**_PROMPT, "image": parts.image()},
    ),
    "CogVideoXVideoToVideoPipeline": Entry(
        functools.partial(_made, "CogVideoXVideoToVideoPipeline", use_rotary_positional_embeddings=True),
        {**_SIZE, "num_inference_steps": 4, "strength": 0.5},
        {**_PROMPT, "video": parts.clip(9)},
    ),
    "CogVideoXFunControlPipeline": Entry(
        functools.partial(_made, "CogVideoXFunControlPipeline", in_channels=8, use_rotary_positional_embeddings=True),
        _SIZE,
        {**_PROMPT, "control_video": parts.clip(9)},
    ),
    "ConsisIDPipeline": Entry(
        _consisid,
        _CALL,
        {**_PROMPT, "image": parts.image(), "id_vit_hidden": [torch.ones(1, 2, 4)], "id_cond": torch.ones(1, 4)},
    ),
}

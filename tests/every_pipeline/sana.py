"""Sana-Video, and Sana's world model."""

from __future__ import annotations

import diffusers
import numpy
import tiny_parts as parts
import torch
from tiny_vaes import ltx2_vae, wan_vae

from .entry import Entry

_CALL = {
    "height": 32,
    "width": 32,
    "frames": 5,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "max_sequence_length": 16,
    "complex_human_instruction": [],
    "use_resolution_binning": False,
}
_PROMPT = {"prompt": parts.TEXT}


def _made(pipeline: str, scheduler):
    torch.manual_seed(0)
    return parts.frozen(
        getattr(diffusers, pipeline)(
            tokenizer=parts.tokenizer(512),
            text_encoder=parts.gemma2(),
            vae=wan_vae(),
            transformer=diffusers.SanaVideoTransformer3DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=12,
                num_layers=2,
                num_cross_attention_heads=2,
                cross_attention_head_dim=12,
                cross_attention_dim=24,
                caption_channels=8,
                sample_size=4,
            ),
            scheduler=scheduler,
        )
    )


def _text():
    return _made(
        "SanaVideoPipeline",
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def _image():
    return _made("SanaImageToVideoPipeline", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


def _world():
    torch.manual_seed(0)
    return parts.frozen(
        diffusers.SanaWMPipeline(
            tokenizer=parts.tokenizer(512),
            text_encoder=parts.gemma2(),
            vae=ltx2_vae(),
            transformer=parts.without_zeros(
                diffusers.SanaWMTransformer3DModel(
                    in_channels=8,
                    num_layers=2,
                    hidden_size=32,
                    num_attention_heads=2,
                    softmax_every_n=2,
                    linear_head_dim=16,
                    chunk_plucker_post_attn_blocks=2,
                    chunk_plucker_channels=24,  # six for each frame of a latent frame
                    caption_channels=8,
                    image_size=16,
                )
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    )


ENTRIES = {
    "SanaVideoPipeline": Entry(_text, _CALL, _PROMPT),
    "SanaImageToVideoPipeline": Entry(_image, _CALL, {**_PROMPT, "image": parts.image()}),
    "SanaWMPipeline": Entry(
        _world,
        {
            "height": 16,
            "width": 16,
            "num_frames": 9,
            "num_inference_steps": 2,
            "guidance_scale": 3.0,
            "max_sequence_length": 16,
        },
        {**_PROMPT, "image": parts.image(), "action": "w-8", "intrinsics": numpy.array([16.0, 16.0, 8.0, 8.0])},
        targets=("qkv", "proj", "q_linear", "kv_linear"),
    ),
}

"""LTX-Video: from text, an image, conditions, and several prompts one after the other."""

from __future__ import annotations

import functools

import diffusers
import tiny_parts as parts
import torch
from tiny_vaes import ltx_vae

from .entry import Entry

_CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 9,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "max_sequence_length": 16,
}
_PROMPT = {"prompt": parts.TEXT}


def _made(pipeline: str, conditioned: bool = False):
    torch.manual_seed(0)
    return parts.frozen(
        getattr(diffusers, pipeline)(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=ltx_vae(conditioned),
            text_encoder=parts.t5(),
            tokenizer=parts.tokenizer(),
            transformer=diffusers.LTXVideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                num_attention_heads=2,
                attention_head_dim=12,
                cross_attention_dim=24,
                num_layers=2,
                caption_channels=8,
            ),
        )
    )


ENTRIES = {
    "LTXPipeline": Entry(functools.partial(_made, "LTXPipeline"), _CALL, _PROMPT),
    "LTXPipeline/decoder_with_time": Entry(
        functools.partial(_made, "LTXPipeline", conditioned=True),
        {**_CALL, "decode_timestep": 0.05, "decode_noise_scale": 0.025, "guidance_rescale": 0.5},
        _PROMPT,
    ),
    "LTXImageToVideoPipeline": Entry(
        functools.partial(_made, "LTXImageToVideoPipeline"), _CALL, {**_PROMPT, "image": parts.image()}
    ),
    "LTXConditionPipeline": Entry(
        functools.partial(_made, "LTXConditionPipeline"), _CALL, {**_PROMPT, "image": parts.image()}
    ),
    "LTXConditionPipeline/video": Entry(
        functools.partial(_made, "LTXConditionPipeline"),
        {**_CALL, "num_inference_steps": 4, "denoise_strength": 0.5},
        {**_PROMPT, "video": parts.clip(9)},
    ),
    "LTXI2VLongMultiPromptPipeline": Entry(
        functools.partial(_made, "LTXI2VLongMultiPromptPipeline"),
        # Of its steps it leaves out the first.
        {**_CALL, "num_inference_steps": 3, "decode_horizontal_tiles": 1, "decode_vertical_tiles": 1},
        {**_PROMPT, "cond_image": parts.image()},
    ),
}

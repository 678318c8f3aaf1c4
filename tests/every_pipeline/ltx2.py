"""LTX-2: video with sound."""

from __future__ import annotations

import functools

import diffusers
import tiny_parts as parts
import torch
from tiny_vaes import ltx2_vae

from .entry import Entry

_CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 9,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "max_sequence_length": 16,
}
_GUIDED = {**_CALL, "spatio_temporal_guidance_blocks": [1]}  # the default is of the published model's 48
_PROMPT = {"prompt": parts.TEXT}


def _made(pipeline: str, **changes):
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    torch.manual_seed(0)
    layers = 2
    connectors = {
        f"{kind}_connector_{key}": value
        for kind in ("video", "audio")
        for key, value in {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_layers": 1,
            "num_learnable_registers": None,
        }.items()
    }
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    return parts.frozen(
        getattr(diffusers, pipeline)(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=ltx2_vae(),
            audio_vae=audio_vae,
            text_encoder=parts.gemma3(layers=layers),
            tokenizer=parts.tokenizer(512),
            connectors=LTX2TextConnectors(
                caption_channels=8,
                text_proj_in_factor=layers + 1,
                **connectors,
                connector_rope_base_seq_len=32,
                rope_double_precision=False,
                rope_type="split",
            ),
            transformer=diffusers.LTX2VideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                num_attention_heads=2,
                attention_head_dim=8,
                cross_attention_dim=16,
                audio_in_channels=4,
                audio_out_channels=4,
                audio_num_attention_heads=2,
                audio_attention_head_dim=4,
                audio_cross_attention_dim=8,
                num_layers=2,
                caption_channels=8,
                rope_double_precision=False,
                rope_type="split",
                **changes,
            ),
            vocoder=LTX2Vocoder(
                in_channels=audio_vae.config.output_channels * audio_vae.config.mel_bins,
                hidden_channels=8,
                out_channels=2,
                upsample_kernel_sizes=[4, 4],
                upsample_factors=[2, 2],
                resnet_kernel_sizes=[3],
                resnet_dilations=[[1, 3, 5]],
                output_sampling_rate=16000,
            ),
        )
    )


def _video_condition():
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    return LTX2VideoCondition(frames=parts.image(), index=0, crf=0)


def _reference_condition():
    from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

    return LTX2ReferenceCondition(frames=parts.clip(9))


def _hdr_condition():
    from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition

    return LTX2HDRReferenceCondition(frames=parts.clip(9))


ENTRIES = {
    "LTX2Pipeline": Entry(functools.partial(_made, "LTX2Pipeline"), _GUIDED, _PROMPT),
    "LTX2ImageToVideoPipeline": Entry(
        functools.partial(_made, "LTX2ImageToVideoPipeline"), _GUIDED, {**_PROMPT, "image": parts.image()}
    ),
    "LTX2ConditionPipeline": Entry(
        functools.partial(_made, "LTX2ConditionPipeline"),
        _GUIDED,
        {**_PROMPT, "conditions": _video_condition()},
    ),
    "LTX2InContextPipeline": Entry(
        functools.partial(_made, "LTX2InContextPipeline"),
        _GUIDED,
        {**_PROMPT, "reference_conditions": _reference_condition(), "conditions": _video_condition()},
    ),
    "LTX2HDRPipeline": Entry(
        functools.partial(_made, "LTX2HDRPipeline"),
        _CALL,
        {**_PROMPT, "reference_conditions": _hdr_condition()},
        fault="makes linear light without an upper bound, not frames in [0, 1]",
    ),
    "LTX2DFRPipeline": Entry(
        functools.partial(_made, "LTX2DFRPipeline", use_keyframes_abs_pos_embedding=True),
        {key: _CALL[key] for key in ("height", "width", "num_frames", "max_sequence_length")} | {"sigmas": [1.0, 0.5]},
        _PROMPT,
    ),
}

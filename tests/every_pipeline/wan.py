"""Pipelines on Wan's decoder and transformers like its own: Wan, Lucy, SkyReels V2, ChronoEdit, AnyFlow, Helios."""

from __future__ import annotations

import functools

import diffusers
import tiny_parts as parts
import tiny_pipelines
import torch
from tiny_vaes import wan_vae

from .entry import Entry

_SIZE = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0, "max_sequence_length": 16}
_CALL = {**_SIZE, "num_frames": 5}
_PROMPT = {"prompt": parts.TEXT}
_IMAGE = {**_PROMPT, "image": parts.image()}
_VIDEO = {**_PROMPT, "video": parts.clip(5)}
_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 2,
}
_FROM_IMAGE = {"in_channels": 12, "image_dim": 8}  # latents of the image and its mask beside the noise


def _euler():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def _unipc():
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _made(pipeline: str, transformer: str, scheduler=_euler, image: bool = False, own=None, **changes):
    torch.manual_seed(0)
    components = {
        "tokenizer": parts.tokenizer(512),
        "text_encoder": parts.t5(multilingual=True),
        "vae": wan_vae(),
        "scheduler": scheduler(),
        "transformer": getattr(diffusers, transformer)(**{**_TRANSFORMER, **changes}),
        **(own or {}),
    }
    if image:
        encoder, processor = parts.clip_vision(projection=False)
        components |= {"image_encoder": encoder, "image_processor": processor}
    return parts.frozen(getattr(diffusers, pipeline)(**components))


def _entry(pipeline: str, transformer: str, call, row, fault: str = "", untrained: str = "", **made):
    return Entry(functools.partial(_made, pipeline, transformer, **made), call, row, fault=fault, untrained=untrained)


def _wan_animate():
    return _made(
        "WanAnimatePipeline",
        "WanAnimateTransformer3DModel",
        image=True,
        in_channels=12,
        latent_channels=4,
        image_dim=8,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


def _without(call, *names: str):
    return {key: value for key, value in call.items() if key not in names}


_SKYREELS = "SkyReelsV2Transformer3DModel"
_FORCING = {**_CALL, "base_num_frames": 5}
_HELIOS = {
    **_CALL,
    "num_latent_frames_per_chunk": 3,
    "num_frames": 9,
    "history_sizes": [4, 2, 1],
}


def _one_stage():
    return diffusers.HeliosScheduler(stages=1, stage_range=[0, 1])


def _three_stages():
    # With the published 1/3 the covariance of the noise between levels is singular, which a CPU's Cholesky refuses.
    return diffusers.HeliosScheduler(gamma=0.3)


def _helios(pipeline: str, scheduler, **own):
    return _made(
        pipeline,
        "HeliosTransformer3DModel",
        scheduler=scheduler,
        own=own,
        rope_dim=(4, 4, 4),
        has_multi_term_memory_patch=True,
        guidance_cross_attn=True,
        zero_history_timestep=True,
        is_amplify_history=False,
    )


ENTRIES = {
    "WanPipeline": Entry(tiny_pipelines.wan_t2v, _CALL, _PROMPT),
    "WanPipeline/two_stages": Entry(functools.partial(tiny_pipelines.wan_t2v, two_stage=True), _CALL, _PROMPT),
    "WanImageToVideoPipeline": Entry(tiny_pipelines.wan_i2v, _CALL, _IMAGE),
    "WanImageToVideoPipeline/last_image": Entry(
        functools.partial(
            _made,
            "WanImageToVideoPipeline",
            "WanTransformer3DModel",
            image=True,
            **_FROM_IMAGE,
            added_kv_proj_dim=24,
            pos_embed_seq_len=2 * 5,
        ),
        _CALL,
        {**_IMAGE, "last_image": parts.image(5)},
    ),
    "WanVideoToVideoPipeline": _entry(
        "WanVideoToVideoPipeline",
        "WanTransformer3DModel",
        {**_SIZE, "num_inference_steps": 4, "strength": 0.5},
        _VIDEO,
    ),
    "WanVACEPipeline": Entry(
        tiny_pipelines.wan_vace,
        _CALL,
        {**_VIDEO, "mask": parts.clip(5, seed=7), "reference_images": [parts.image(8)]},
    ),
    "WanAnimatePipeline": Entry(
        _wan_animate,
        {**_SIZE, "segment_frame_length": 5},
        {**_IMAGE, "pose_video": parts.clip(5), "face_video": parts.clip(5, seed=6)},
    ),
    "LucyEditPipeline": _entry("LucyEditPipeline", "WanTransformer3DModel", _CALL, _VIDEO, in_channels=8),
    "SkyReelsV2Pipeline": _entry("SkyReelsV2Pipeline", _SKYREELS, _CALL, _PROMPT, scheduler=_unipc),
    "SkyReelsV2ImageToVideoPipeline": _entry(
        "SkyReelsV2ImageToVideoPipeline",
        _SKYREELS,
        _CALL,
        _IMAGE,
        scheduler=_unipc,
        image=True,
        **_FROM_IMAGE,
        added_kv_proj_dim=24,
    ),
    "SkyReelsV2DiffusionForcingPipeline": _entry(
        "SkyReelsV2DiffusionForcingPipeline", _SKYREELS, _FORCING, _PROMPT, scheduler=_unipc
    ),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": _entry(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline", _SKYREELS, _FORCING, _IMAGE, scheduler=_unipc
    ),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": _entry(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        _SKYREELS,
        {**_FORCING, "num_frames": 13, "base_num_frames": 9, "overlap_history": 5},
        _VIDEO,
        scheduler=_unipc,
    ),
    "ChronoEditPipeline": _entry(
        "ChronoEditPipeline",
        "ChronoEditTransformer3DModel",
        _CALL,
        _IMAGE,
        image=True,
        **_FROM_IMAGE,
        added_kv_proj_dim=24,
    ),
    "AnyFlowPipeline": _entry(
        "AnyFlowPipeline",
        "AnyFlowTransformer3DModel",
        _CALL,
        _PROMPT,
        scheduler=lambda: diffusers.FlowMapEulerDiscreteScheduler(shift=3.0),
        gate_value=0.25,
        deltatime_type="r",
    ),
    "AnyFlowFARPipeline": _entry(
        "AnyFlowFARPipeline",
        "AnyFlowFARTransformer3DModel",
        _CALL,
        _PROMPT,
        scheduler=lambda: diffusers.FlowMapEulerDiscreteScheduler(shift=3.0),
        compressed_patch_size=(1, 4, 4),
        full_chunk_limit=3,
        gate_value=0.25,
        deltatime_type="r",
        chunk_partition=(1, 1),
    ),
    "HeliosPipeline": Entry(
        functools.partial(_helios, "HeliosPipeline", _one_stage),
        _HELIOS,
        _PROMPT,
    ),
    "HeliosPipeline/chunks": Entry(
        functools.partial(_helios, "HeliosPipeline", _one_stage),
        {**_HELIOS, "num_frames": 17},
        _PROMPT,
    ),
    "HeliosPyramidPipeline": Entry(
        functools.partial(_helios, "HeliosPyramidPipeline", _three_stages),
        {
            **_without(_HELIOS, "num_inference_steps"),
            "pyramid_num_inference_steps_list": [2, 2, 2],
            **dict.fromkeys(("height", "width"), 32),  # of which the lowest level has a quarter
        },
        _PROMPT,
    ),
}

"""Cosmos 1, 2, 2.5 and 3."""

from __future__ import annotations

import functools

import diffusers
import tiny_parts as parts
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from tiny_vaes import cosmos_vae, wan_vae

from .entry import Entry

_CALL = {
    "height": 16,
    "width": 16,
    "num_frames": 9,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "max_sequence_length": 16,
}
_PROMPT = {"prompt": parts.TEXT}
_IMAGE = {**_PROMPT, "image": parts.image()}
_VIDEO = {**_PROMPT, "video": parts.clip(5)}  # the frames that a longer one begins with
_TARGETS = ("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_TRANSFORMER = {
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": 8,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
}


class SafetyChecker(ModelMixin, ConfigMixin):
    """In place of the published one, whose networks are far from tiny: finds everything safe."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anything", torch.zeros(1))

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames):
        return frames


def _cosmos1(pipeline: str, in_channels: int):
    torch.manual_seed(0)
    return parts.frozen(
        getattr(diffusers, pipeline)(
            text_encoder=parts.t5(),
            tokenizer=parts.tokenizer(),
            transformer=parts.without_zeros(
                diffusers.CosmosTransformer3DModel(in_channels=in_channels, **_TRANSFORMER)
            ),
            vae=cosmos_vae(),
            scheduler=diffusers.EDMEulerScheduler(final_sigmas_type="sigma_min"),
            safety_checker=SafetyChecker(),
        )
    )


def _cosmos2():
    torch.manual_seed(0)
    return parts.frozen(
        diffusers.Cosmos2VideoToWorldPipeline(
            text_encoder=parts.t5(),
            tokenizer=parts.tokenizer(),
            transformer=parts.without_zeros(diffusers.CosmosTransformer3DModel(in_channels=5, **_TRANSFORMER)),
            vae=wan_vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
            safety_checker=SafetyChecker(),
        )
    )


def _cosmos25(pipeline: str, control: bool = False):
    torch.manual_seed(0)
    image = {"img_context_dim_in": 8, "img_context_dim_out": 32}
    controlnet = diffusers.CosmosControlNetModel(
        n_controlnet_blocks=2,
        in_channels=4 + 1 + 1,  # latents of the control, a mask of conditions and one of padding
        latent_channels=4 + 1 + 1,
        model_channels=32,
        extra_pos_embed_type="learnable",
        **{key: value for key, value in _TRANSFORMER.items() if key not in ("out_channels", "num_layers")},
        **image,
    )
    own = {"controlnet_block_every_n": 1, "img_context_num_tokens": 4, **image} if control else {}
    return parts.frozen(
        getattr(diffusers, pipeline)(
            text_encoder=parts.qwen_vl(width=4),  # the states of its two layers beside each other
            tokenizer=parts.chat_tokenizer(),
            transformer=parts.without_zeros(diffusers.CosmosTransformer3DModel(in_channels=5, **_TRANSFORMER, **own)),
            vae=wan_vae(),
            scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            **({"controlnet": parts.without_zeros(controlnet)} if control else {}),
            safety_checker=SafetyChecker(),
        )
    )


def _cosmos3():
    torch.manual_seed(0)
    return parts.frozen(
        diffusers.Cosmos3OmniPipeline(
            transformer=parts.without_zeros(
                diffusers.Cosmos3OmniTransformer(
                    head_dim=6,
                    hidden_size=12,
                    intermediate_size=12,
                    latent_channel=4,
                    latent_patch_size=1,
                    num_attention_heads=2,
                    num_hidden_layers=2,
                    num_key_value_heads=1,
                    patch_latent_dim=4,
                    rope_axes_dim=[1, 1, 1],
                    vocab_size=64,
                )
            ),
            text_tokenizer=parts.chat_tokenizer(),
            vae=wan_vae(),
            scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            enable_safety_checker=False,
        )
    )


# Its schedule ends with the least noise level twice, so that the last step has no length.
_IDLE = {"call": {**_CALL, "num_inference_steps": 3}, "idle": 1}

ENTRIES = {
    "CosmosTextToWorldPipeline": Entry(
        functools.partial(_cosmos1, "CosmosTextToWorldPipeline", 4), row=_PROMPT, **_IDLE
    ),
    "CosmosVideoToWorldPipeline": Entry(
        functools.partial(_cosmos1, "CosmosVideoToWorldPipeline", 5), row=_VIDEO, **_IDLE
    ),
    "Cosmos2VideoToWorldPipeline": Entry(_cosmos2, row=_IMAGE, **_IDLE),
    "Cosmos2VideoToWorldPipeline/video": Entry(_cosmos2, row=_VIDEO, **_IDLE),
    "Cosmos2_5_PredictBasePipeline": Entry(
        functools.partial(_cosmos25, "Cosmos2_5_PredictBasePipeline"), _CALL, _PROMPT
    ),
    "Cosmos2_5_PredictBasePipeline/image": Entry(
        functools.partial(_cosmos25, "Cosmos2_5_PredictBasePipeline"), _CALL, _IMAGE
    ),
    "Cosmos2_5_TransferPipeline": Entry(
        functools.partial(_cosmos25, "Cosmos2_5_TransferPipeline", control=True),
        {**_CALL, "num_frames_per_chunk": 9},
        {**_PROMPT, "controls": parts.clip(9)},
    ),
    "Cosmos3OmniPipeline": Entry(
        _cosmos3,
        {key: value for key, value in _CALL.items() if key != "max_sequence_length"},
        _PROMPT,
        targets=_TARGETS,
    ),
    "Cosmos3OmniPipeline/image": Entry(
        _cosmos3,
        {key: value for key, value in _CALL.items() if key != "max_sequence_length"},
        _IMAGE,
        targets=_TARGETS,
    ),
}

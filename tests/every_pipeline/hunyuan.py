"""HunyuanVideo, its image-to-video kin, FramePack, and HunyuanVideo 1.5."""

from __future__ import annotations

import functools

import diffusers
import tiny_parts as parts
import torch
from tiny_vaes import hunyuan_video15_vae, hunyuan_video_vae

from .entry import Entry

_TEMPLATE = {"template": "<|im_start|> {}", "crop_start": 1}
_CALL = {
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "num_inference_steps": 2,
    "max_sequence_length": 16,
    "prompt_template": _TEMPLATE,
}
_PROMPT = {"prompt": parts.TEXT}
_IMAGE = {**_PROMPT, "image": parts.image()}
# The pipeline looks for the ends of three headers.
_IMAGE_TEMPLATE = "<|im_start|> <|end_header_id|> <image> <|im_start|> <|end_header_id|> {} a a a <|end_header_id|> a"
_TRANSFORMER = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "guidance_embeds": True,
    "text_embed_dim": 8,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 4, 4),
}


def _made(pipeline: str, transformer: str = "HunyuanVideoTransformer3DModel", own=None, **changes):
    torch.manual_seed(0)
    components = {
        "text_encoder": parts.llama(),
        "tokenizer": parts.chat_tokenizer(),
        "transformer": getattr(diffusers, transformer)(**{**_TRANSFORMER, **changes}),
        "vae": hunyuan_video_vae(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder_2": parts.clip_text(),
        "tokenizer_2": parts.tokenizer(),
    }
    return parts.frozen(getattr(diffusers, pipeline)(**{**components, **(own() if own else {})}))


def _llava():
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, image_size=28, patch_size=14
    )
    tokenizer = parts.chat_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|end_header_id|>"]})
    config = LlavaConfig(
        vision_config=vision,
        text_config=parts.llama_config(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": LlavaForConditionalGeneration(config),
        "image_processor": CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    }


def _siglip():
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    return {
        "image_encoder": SiglipVisionModel(config),
        "feature_extractor": SiglipImageProcessor(size={"height": 16, "width": 16}),
    }


def _hunyuan15(pipeline: str, image: bool = False):
    from diffusers.guiders import ClassifierFreeGuidance
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    return parts.frozen(
        getattr(diffusers, pipeline)(
            text_encoder=Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**parts.qwen_text(8))),
            tokenizer=parts.chat_tokenizer(),
            transformer=diffusers.HunyuanVideo15Transformer3DModel(
                in_channels=9,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=12,
                num_layers=1,
                num_refiner_layers=1,
                text_embed_dim=8,
                text_embed_2_dim=8,
                image_embed_dim=8,
                rope_axes_dim=(4, 4, 4),
                target_size=16,
                task_type="i2v" if image else "t2v",
            ),
            vae=hunyuan_video15_vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder_2=T5EncoderModel(
                T5Config(vocab_size=400, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
            ),
            tokenizer_2=ByT5Tokenizer(),
            guider=ClassifierFreeGuidance(guidance_scale=3.0),
            **(_siglip() if image else {}),
        )
    )


ENTRIES = {
    "HunyuanVideoPipeline": Entry(functools.partial(_made, "HunyuanVideoPipeline"), _CALL, _PROMPT),
    "HunyuanVideoPipeline/true_cfg": Entry(
        functools.partial(_made, "HunyuanVideoPipeline"),
        {**_CALL, "true_cfg_scale": 3.0, "negative_prompt": "blue"},
        _PROMPT,
    ),
    "HunyuanVideoImageToVideoPipeline": Entry(
        functools.partial(
            _made,
            "HunyuanVideoImageToVideoPipeline",
            own=_llava,
            in_channels=9,
            guidance_embeds=False,
            image_condition_type="latent_concat",
        ),
        {
            **_CALL,
            "prompt_template": {
                "template": _IMAGE_TEMPLATE,
                "crop_start": 5,
                "image_emb_len": 4,
                "image_emb_start": 2,
                "image_emb_end": 6,
                "double_return_token_id": 2,
            },
            "image_embed_interleave": 2,
        },
        _IMAGE,
    ),
    "HunyuanSkyreelsImageToVideoPipeline": Entry(
        functools.partial(_made, "HunyuanSkyreelsImageToVideoPipeline", in_channels=8),
        {**_CALL, "true_cfg_scale": 3.0},
        _IMAGE,
    ),
    "HunyuanVideoFramepackPipeline": Entry(
        functools.partial(
            _made,
            "HunyuanVideoFramepackPipeline",
            "HunyuanVideoFramepackTransformer3DModel",
            own=_siglip,
            patch_size=2,
            has_image_proj=True,
            image_proj_dim=8,
            has_clean_x_embedder=True,
        ),
        {**_CALL, "latent_window_size": 2},
        _IMAGE,
    ),
    "HunyuanVideoFramepackPipeline/sections": Entry(
        functools.partial(
            _made,
            "HunyuanVideoFramepackPipeline",
            "HunyuanVideoFramepackTransformer3DModel",
            own=_siglip,
            patch_size=2,
            has_image_proj=True,
            image_proj_dim=8,
            has_clean_x_embedder=True,
        ),
        {**_CALL, "num_frames": 13, "latent_window_size": 2},
        _IMAGE,
    ),
    "HunyuanVideo15Pipeline": Entry(
        functools.partial(_hunyuan15, "HunyuanVideo15Pipeline"),
        {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2},
        _PROMPT,
    ),
    "HunyuanVideo15ImageToVideoPipeline": Entry(
        functools.partial(_hunyuan15, "HunyuanVideo15ImageToVideoPipeline", image=True),
        {"num_frames": 5, "num_inference_steps": 2},
        _IMAGE,
    ),
}

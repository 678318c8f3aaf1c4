"""Random pipelines of the real classes, a few thousand weights each, made offline.

Their component classes are those of the published models, so that each can stand in for one:
`wan_t2v` for Wan-AI/Wan2.1-T2V-1.3B-Diffusers, `wan_i2v` for Wan-AI/Wan2.1-I2V-14B-480P-Diffusers, `cogvideox` for
THUDM/CogVideoX-2b, `svd` for stabilityai/stable-video-diffusion-img2vid-xt.
"""

import torch
from tiny_parts import frozen as _frozen
from tiny_parts import tokenizer
from tiny_vaes import cogvideox_vae, image_vae, temporal_vae, wan_vae

PROMPTS = ["a red circle moving left", "a large blue star spinning"]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
"""The usual LoRA targets, present in every denoiser here."""


def _tokenizer(max_length: int = 226):
    return tokenizer(max_length, " ".join(PROMPTS))


def _t5(cls, config_cls):
    return cls(config_cls(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2))


def _vision(cls, size: int):
    from transformers import CLIPImageProcessor, CLIPVisionConfig

    config = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=size // 2,
    )
    side = {"height": size, "width": size}
    return cls(config), CLIPImageProcessor(size={"shortest_edge": size}, crop_size=side)


def flow_scheduler(name: str):
    """`"unipc"`, as the published Wan models have it, or `"euler"`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _wan_transformer(in_channels: int, **image):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
        **image,
    )


def wan_t2v(scheduler: str = "unipc", two_stage: bool = False):
    """Wan 2.1 text-to-video; with `two_stage` Wan 2.2's pair of transformers for high and low noise."""
    from diffusers import WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    return _frozen(
        WanPipeline(
            tokenizer=_tokenizer(512),
            text_encoder=_t5(UMT5EncoderModel, UMT5Config),
            vae=wan_vae(),
            scheduler=flow_scheduler(scheduler),
            transformer=_wan_transformer(4),
            transformer_2=_wan_transformer(4) if two_stage else None,
            boundary_ratio=0.9 if two_stage else None,
        )
    )


def wan_vace(scheduler: str = "unipc"):
    """Wan VACE: a control video, a mask and reference images beside the noise."""
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    transformer = WanVACETransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        vace_layers=[0, 1],
        vace_in_channels=24,
        rope_max_seq_len=32,
    )
    return _frozen(
        WanVACEPipeline(
            tokenizer=_tokenizer(512),
            text_encoder=_t5(UMT5EncoderModel, UMT5Config),
            vae=wan_vae(),
            scheduler=flow_scheduler(scheduler),
            transformer=transformer,
        )
    )


def wan_i2v(scheduler: str = "unipc", two_stage: bool = False):
    """Wan 2.1 image-to-video: latents of the image and its mask beside the noise, CLIP tokens beside the text.

    With `two_stage` Wan 2.2's pair of transformers, which have no CLIP tokens.
    """
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPVisionModel, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    image_encoder, image_processor = (None, None) if two_stage else _vision(CLIPVisionModel, 32)
    image = {} if two_stage else {"image_dim": 8, "added_kv_proj_dim": 24}
    return _frozen(
        WanImageToVideoPipeline(
            tokenizer=_tokenizer(512),
            text_encoder=_t5(UMT5EncoderModel, UMT5Config),
            vae=wan_vae(),
            scheduler=flow_scheduler(scheduler),
            image_encoder=image_encoder,
            image_processor=image_processor,
            transformer=_wan_transformer(12, **image),
            transformer_2=_wan_transformer(12) if two_stage else None,
            boundary_ratio=0.9 if two_stage else None,
        )
    )


def cogvideox(scheduler=None):
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=8,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
    )
    return _frozen(
        CogVideoXPipeline(
            tokenizer=_tokenizer(),
            text_encoder=_t5(T5EncoderModel, T5Config),
            vae=cogvideox_vae(),
            transformer=transformer,
            scheduler=scheduler
            or CogVideoXDDIMScheduler(
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                snr_shift_scale=3.0,
                timestep_spacing="trailing",
            ),
        )
    )


def svd():
    """Stable Video Diffusion: the image is the condition, there is no prompt."""
    from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionModelWithProjection

    torch.manual_seed(0)
    # The pipeline resizes the image to 224 x 224 whatever its encoder; the UNet's group norms ask for 32 channels.
    image_encoder, feature_extractor = _vision(CLIPVisionModelWithProjection, 224)
    unet = UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 32),
        layers_per_block=1,
        num_attention_heads=2,
        cross_attention_dim=8,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        sample_size=8,
        num_frames=4,
    )
    return _frozen(
        StableVideoDiffusionPipeline(
            vae=temporal_vae(),
            image_encoder=image_encoder,
            unet=unet,
            scheduler=EulerDiscreteScheduler(
                prediction_type="v_prediction",
                timestep_spacing="leading",
                timestep_type="continuous",
                use_karras_sigmas=True,
                sigma_min=0.002,
                sigma_max=700.0,
                steps_offset=1,
                beta_schedule="scaled_linear",
                beta_start=0.00085,
                beta_end=0.012,
            ),
            feature_extractor=feature_extractor,
        )
    )


def animatediff():
    """Stable Diffusion's image UNet with motion modules, and its frame-wise decoder."""
    from diffusers import AnimateDiffPipeline, DDIMScheduler, UNetMotionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    unet = UNetMotionModel(
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        sample_size=8,
    )
    return _frozen(
        AnimateDiffPipeline(
            vae=image_vae(),
            text_encoder=text_encoder,
            tokenizer=_tokenizer(16),
            unet=unet,
            motion_adapter=None,
            scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
        )
    )


def picture(seed: int = 0, size: int = 16):
    """A random condition image."""
    from PIL import Image

    pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


_SIZE = {"height": 16, "width": 16, "num_inference_steps": 3}
_TEXT = {"prompt": PROMPTS, "guidance_scale": 3.0, **_SIZE}
CALLS = {
    "wan_t2v": {**_TEXT, "num_frames": 5, "max_sequence_length": 16},
    "wan_i2v": {**_TEXT, "num_frames": 5, "max_sequence_length": 16, "image": picture()},
    "cogvideox": {**_TEXT, "num_frames": 9},
    "svd": {"image": [picture(0), picture(1)], **_SIZE, "num_frames": 4, "decode_chunk_size": 4},
    "animatediff": {**_TEXT, "num_frames": 3},
}
"""The least call of each pipeline: two different samples, three steps, guidance."""

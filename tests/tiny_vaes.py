"""Random decoders of the real classes, a few thousand weights each."""

import diffusers
import torch


def _frozen(cls, **config):
    """With the same random weights each time."""
    torch.manual_seed(0)
    return cls(**config).requires_grad_(False).eval()


def wan_vae(residual: bool = False, spatial_levels: int = 2, z_dim: int = 4):
    """Wan 2.1's decoder, or with `residual` Wan 2.2's: average-and-duplicate shortcuts and a patchified output."""
    patch = 2 if residual else None
    channels = 12 if residual else 3
    return _frozen(
        diffusers.AutoencoderKLWan,
        base_dim=4,
        z_dim=z_dim,
        dim_mult=[1, 2, 2, 2][: spatial_levels + 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True][-spatial_levels:],
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
        is_residual=residual,
        in_channels=channels,
        out_channels=channels,
        patch_size=patch,
        scale_factor_spatial=2**spatial_levels * (patch or 1),
        scale_factor_temporal=4,
    )


def image_vae():
    """Stable Diffusion's frame-wise decoder."""
    return _frozen(
        diffusers.AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def cogvideox_vae():
    return _frozen(
        diffusers.AutoencoderKLCogVideoX,
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(4, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )


def temporal_vae():
    """Stable Video Diffusion's decoder: frame-wise encoder, decoder with temporal layers over the whole chunk."""
    # The decoder's group norms are over 32 channels, which is therefore the least width.
    return _frozen(
        diffusers.AutoencoderKLTemporalDecoder,
        down_block_types=("DownEncoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        latent_channels=4,
        layers_per_block=1,
    )


def qwen_image_vae():
    return _frozen(
        diffusers.AutoencoderKLQwenImage,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def mochi_vae(framewise: bool = False, latent_channels: int = 4):
    """Group norms are over 32 groups, which is therefore the least width."""
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d

    vae = _frozen(
        diffusers.AutoencoderKLMochi,
        in_channels=15,
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        latent_channels=latent_channels,
        layers_per_block=(3, 1, 1, 1),
        temporal_expansions=(1, 3),
        spatial_expansions=(2, 1),
        add_attention_block=(False,) * 4,
    )
    if framewise:
        vae._enable_framewise_decoding()
        for module in vae.modules():  # which leaves convolutions without a padding in space
            if isinstance(module, CogVideoXCausalConv3d):
                module.conv.padding = module.const_padding_conv3d
    return vae


def hunyuan_video_vae():
    vae = _frozen(
        diffusers.AutoencoderKLHunyuanVideo,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        spatial_compression_ratio=2,
    )
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 12, 8
    return vae


def hunyuan_video15_vae():
    return _frozen(
        diffusers.AutoencoderKLHunyuanVideo15,
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )


def ltx_vae(conditioned: bool = False):
    """LTX's decoder, or with `conditioned` the later one, which injects noise and takes a timestep."""
    factor = 2 if conditioned else 1
    vae = _frozen(
        diffusers.AutoencoderKLLTXVideo,
        latent_channels=8,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 16) if conditioned else (8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(3, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(conditioned,) * 3,
        downsample_type=("conv",) * 2,
        upsample_residual=(conditioned,) * 2,
        upsample_factor=(factor,) * 2,
        timestep_conditioning=conditioned,
        patch_size=1,
    )
    _unequal_noise(vae)
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 12, 8
    return vae


def ltx2_vae(conditioned: bool = False):
    vae = _frozen(
        diffusers.AutoencoderKLLTX2Video,
        latent_channels=8,
        block_out_channels=(8, 8),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 16),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(conditioned,) * 3,
        downsample_type=("temporal", "spatiotemporal"),
        upsample_type=("spatiotemporal", "temporal"),
        spatial_compression_ratio=4,
        upsample_residual=(True, True),
        upsample_factor=(2, 2),
        timestep_conditioning=conditioned,
        patch_size=2,
        decoder_causal=False,
    )
    _unequal_noise(vae)
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 12, 8
    return vae


def _unequal_noise(vae) -> None:
    """Injected noise is scaled by weights that are zero at first."""
    for name, weight in vae.named_parameters():
        if "per_channel_scale" in name:
            torch.nn.init.normal_(weight)


def cosmos_vae():
    return _frozen(
        diffusers.AutoencoderKLCosmos,
        latent_channels=4,
        encoder_block_out_channels=(4, 4, 4, 4),
        decode_block_out_channels=(4, 8, 8, 8),
        attention_resolutions=(2,),
        resolution=8,
        num_layers=1,
        patch_size=2,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )


def allegro_vae(tiles: bool = True):
    """Tiles of 4 frames, 8 x 8 latents; or without `tiles` those of its config, of 24 frames, 128 x 128 pixels."""
    vae = _frozen(
        diffusers.AutoencoderKLAllegro,
        down_block_types=("AllegroDownBlock3D",) * 3,
        up_block_types=("AllegroUpBlock3D",) * 3,
        block_out_channels=(4, 8, 8),
        temporal_downsample_blocks=(True, False, False),
        temporal_upsample_blocks=(False, True, False),
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
        sample_size=16 if tiles else 128,
    )
    if tiles:
        vae.kernel, vae.stride = (8, 16, 16), (4, 8, 12)
    vae.enable_tiling()
    return vae


def magvit_vae(spatial_group_norm: bool = True):
    return _frozen(
        diffusers.AutoencoderKLMagvit,
        latent_channels=4,
        block_out_channels=(4, 8, 8),
        down_block_types=("SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D"),
        up_block_types=("SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=spatial_group_norm,
    )


def kvae_video_vae():
    """Group norms are over 32 groups, which is therefore the least width."""
    return _frozen(diffusers.AutoencoderKLKVAEVideo, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4)


def kandinsky6_sr_vae():
    return _frozen(
        diffusers.Kandinsky6SRVAE,
        latent_channels=4,
        encoder_block_out_channels=(4, 8, 16),  # which double
        decoder_block_out_channels=(4, 8, 8),
        layers_per_block=1,
        temporal_compression_start_level=0,  # both halvings are of time too
    )

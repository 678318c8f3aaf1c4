"""Random decoders of the real classes, a few thousand weights each."""

import torch


def wan_vae(residual: bool = False, spatial_levels: int = 2, z_dim: int = 4):
    """Wan 2.1's decoder, or with `residual` Wan 2.2's: average-and-duplicate shortcuts and a patchified output."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    patch = 2 if residual else None
    channels = 12 if residual else 3
    vae = AutoencoderKLWan(
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
    return vae.requires_grad_(False).eval()


def image_vae():
    """Stable Diffusion's frame-wise decoder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    return vae.requires_grad_(False).eval()


def cogvideox_vae():
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(4, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return vae.requires_grad_(False).eval()


def temporal_vae():
    """Stable Video Diffusion's decoder: frame-wise encoder, decoder with temporal layers over the whole chunk."""
    from diffusers import AutoencoderKLTemporalDecoder

    torch.manual_seed(0)
    # The decoder's group norms are over 32 channels, which is therefore the least width.
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32), latent_channels=4, layers_per_block=1
    )
    return vae.requires_grad_(False).eval()

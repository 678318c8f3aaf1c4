"""The patches that Qwen's vision-language models see of frames."""

from __future__ import annotations

import torch
from torch import Tensor


def to_patches(pixels: Tensor, patch: int, merge: int, tubelet: int) -> tuple[Tensor, Tensor]:
    """Patches of frames `(N, 3, H, W)`, normalised, and their grid (time, height, width) `(3,)`.

    Patches are `(n, 3 · tubelet · patch · patch)`, in the order of the model: `merge x merge` of them, which it merges,
    follow each other. Where N is no multiple of `tubelet`, the last frame is repeated.
    """
    if missing := -len(pixels) % tubelet:
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
    time, height, width = len(pixels) // tubelet, pixels.shape[2] // patch, pixels.shape[3] // patch
    blocks = pixels.reshape(time, tubelet, 3, height // merge, merge, patch, width // merge, merge, patch)
    patches = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(time * height * width, -1)
    return patches, torch.tensor([time, height, width])

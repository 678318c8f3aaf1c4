"""The image preprocessing of CLIP-like models, on tensors and differentiable.

The official pipelines work on 8-bit PIL images; here the same resampling, cropping and padding run in floating point,
so that the result differs by PIL's rounding only (about 1/255).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """Resize, bring to `size` around the centre, normalise.

    Args:
        size: Height and width, in pixels, that the model takes.
        resize: Keep the shape of the frame and fit its `"shortest"` side, then crop (CLIP), or its `"longest"` side,
            then pad (HPSv2); or `"squash"` it to `size`.
        interpolation: `"bicubic"` (a = -0.5) or `"bilinear"`, both with PIL's antialiasing.
        mean, std: Of the normalisation, one for each colour.
        fill: Value of the padding, before normalisation.
    """

    size: tuple[int, int]
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    fill: float = 0.0

    def __call__(self, frames: Tensor) -> Tensor:
        """`(N, 3, H, W)` in [0, 1] -> `(N, 3, *size)`, normalised, at least float32."""
        frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
        height, width = self._resized_size(frames.shape[-2], frames.shape[-1])
        # PIL resizes the rows, then the columns, and cuts the overshoot of bicubic edges each time. (Pillow 13 takes
        # the columns first where the height shrinks much more; the published models come from before.)
        for size in ((frames.shape[-2], width), (height, width)):
            if size != frames.shape[-2:]:
                frames = F.interpolate(frames, size=size, mode=self.interpolation, antialias=True)
                # The margin keeps the gradient of saturated areas, which rounding would otherwise push over the edge.
                frames = frames.clamp(-1e-5, 1 + 1e-5)
        frames = _centre(frames, self.size, self.fill)
        mean, std = (torch.tensor(v).to(frames).view(-1, 1, 1) for v in (self.mean, self.std))
        return (frames - mean) / std

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        target_height, target_width = self.size
        if self.resize == "squash":
            return self.size
        if self.resize == "longest":  # rounded as HPSv2's ResizeMaxSize does
            scale = min(target_height / height, target_width / width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        if target_height == target_width:  # torchvision truncates the long side...
            if width <= height:
                return target_height * height // width, target_width
            return target_height, target_width * width // height
        ratio = min(height / target_height, width / target_width)  # ...open_clip, for other shapes, rounds it
        return round(height / ratio), round(width / ratio)


def _centre(frames: Tensor, size: tuple[int, int], fill: float) -> Tensor:
    """Pad with `fill`, then crop, around the centre; an odd pixel falls as in torchvision's `center_crop`."""
    missing_y, missing_x = (max(0, wanted - given) for wanted, given in zip(size, frames.shape[-2:], strict=True))
    if missing_y or missing_x:
        left, top = missing_x // 2, missing_y // 2
        frames = F.pad(frames, (left, missing_x - left, top, missing_y - top), value=fill)
    top, left = (round((given - wanted) / 2) for wanted, given in zip(size, frames.shape[-2:], strict=True))
    return frames[..., top : top + size[0], left : left + size[1]]

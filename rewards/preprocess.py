"""The image preprocessing of CLIP-like models, on tensors and differentiable.

The official pipelines work on 8-bit PIL images; here the same resampling, cropping and padding run in floating point,
so that the result differs by PIL's rounding only (about 1/255).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

Resampling = Literal["pil", "tensor", "aliased"]


@dataclass(frozen=True)
class Preprocess:
    """Resize, bring to `size` around the centre, normalise.

    Args:
        size: Height and width, in pixels, that the model takes.
        resize: Keep the shape of the frame and fit its `"shortest"` side, then crop (CLIP), or its `"longest"` side,
            then pad (HPSv2); or `"squash"` it to `size`.
        interpolation: `"bicubic"` or `"bilinear"`.
        mean, std: Of the normalisation, one for each colour.
        fill: Value of the padding, before normalisation.
        shortest: Pixels that `resize="shortest"` gives to the shortest side, `size` at least; None: those of `size`.
        odd: An odd number of surplus pixels leaves one more on one side. `"even"`: of the two halves it crops the even
            one at the top or left (torchvision and open_clip); `"down"`: the smaller one (transformers).
        resampling: `"pil"`: as of 8-bit images, antialiased, and the overshoot of bicubic edges is cut. Of tensors of
            floats, whose overshoot stays: `"tensor"`, antialiased, as torchvision from 0.17 on, and `"aliased"`, which
            skips pixels, as torchvision did before.
    """

    size: tuple[int, int]
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    fill: float = 0.0
    shortest: int | None = None
    odd: Literal["even", "down"] = "even"
    resampling: Resampling = "pil"

    @classmethod
    def of(cls, processor: Any) -> Preprocess:
        """With the settings of a transformers image or video processor that fits the shortest side, then crops."""
        shortest, crop = processor.size["shortest_edge"], processor.crop_size
        crop = (crop["height"], crop["width"])
        if shortest is None or max(crop) > shortest:
            raise ValueError(f"its processor resizes to {dict(processor.size)} and crops to {crop}")
        interpolation: Literal["bicubic", "bilinear"] = "bilinear" if processor.resample == 2 else "bicubic"
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        return cls(crop, "shortest", interpolation, mean, std, shortest=shortest, odd="down")

    def __call__(self, frames: Tensor) -> Tensor:
        """`(N, 3, H, W)` in [0, 1] -> `(N, 3, *size)`, normalised, at least float32."""
        frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
        frames = self._resized(frames, self._resized_size(frames.shape[-2], frames.shape[-1]))
        frames = self._centred(frames)
        mean, std = (torch.tensor(v).to(frames).view(-1, 1, 1) for v in (self.mean, self.std))
        return (frames - mean) / std

    def _resized(self, frames: Tensor, size: tuple[int, int]) -> Tensor:
        if size == frames.shape[-2:]:
            return frames
        if self.resampling != "pil":
            return F.interpolate(frames, size=size, mode=self.interpolation, antialias=self.resampling == "tensor")
        # PIL resizes the rows, then the columns, and cuts the overshoot of bicubic edges each time. (Pillow 13 takes
        # the columns first where the height shrinks much more; the published models come from before.)
        for step in ((frames.shape[-2], size[1]), size):
            if step != frames.shape[-2:]:
                frames = F.interpolate(frames, size=step, mode=self.interpolation, antialias=True)
                # The margin keeps the gradient of saturated areas, which rounding would otherwise push over the edge.
                frames = frames.clamp(-1e-5, 1 + 1e-5)
        return frames

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        target_height, target_width = self.size
        if self.resize == "squash":
            return self.size
        if self.resize == "longest":  # rounded as HPSv2's ResizeMaxSize does
            scale = min(target_height / height, target_width / width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        if self.shortest is not None or target_height == target_width:  # torchvision truncates the long side...
            shortest = self.shortest or target_height
            return shortest * height // min(height, width), shortest * width // min(height, width)
        ratio = min(height / target_height, width / target_width)  # ...open_clip, for other shapes, rounds it
        return round(height / ratio), round(width / ratio)

    def _centred(self, frames: Tensor) -> Tensor:
        """Pad with `fill`, then crop, around the centre."""
        given = frames.shape[-2:]
        missing_y, missing_x = (max(0, wanted - side) for wanted, side in zip(self.size, given, strict=True))
        if missing_y or missing_x:
            left, top = missing_x // 2, missing_y // 2
            frames = F.pad(frames, (left, missing_x - left, top, missing_y - top), value=self.fill)
        surplus = [side - wanted for wanted, side in zip(self.size, frames.shape[-2:], strict=True)]
        top, left = (pixels // 2 if self.odd == "down" else round(pixels / 2) for pixels in surplus)
        return frames[..., top : top + self.size[0], left : left + self.size[1]]

"""Features of frames by networks that were trained on images, in which subjects and scenes are compared."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, ViTModel

from chopgrad_align import Frames, SampledReward, UsageError

from .checkpoints import load_pretrained, loading
from .precision import InFloat32, wide
from .preprocess import Preprocess
from .whole_video import recompute_blocks

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoFeatures(nn.Module):
    """The class token of DINO (Caron et al., arXiv 2104.14294): `(N, 3, H, W)` in [0, 1] -> unit vectors `(N, D)`.

    The shortest side is resized (bilinear) to the size that the model was trained on, and nothing is cropped: position
    embeddings are interpolated as transformers does it. (The original adds 0.1 patches to the size there, which moves
    features of frames that are not square a little.)

    Args:
        reward: Whose they are, for messages.
        checkpoint: Hub id or local folder of a transformers ViTModel.

    Raises:
        UsageError: It does not exist or holds another model.
    """

    def __init__(self, reward: str, checkpoint: str) -> None:
        super().__init__()
        with loading(f"{reward}: checkpoint={checkpoint!r}", "hub id or folder of a transformers ViTModel"):
            self.model = load_pretrained(ViTModel, checkpoint, add_pooling_layer=False)
        recompute_blocks(self.model.layers)

    def forward(self, frames: Tensor) -> Tensor:
        side, (height, width) = self.model.config.image_size, frames.shape[-2:]
        size = side * height // min(height, width), side * width // min(height, width)
        pixels = Preprocess(size, "squash", "bilinear", *_IMAGENET)(frames)
        pixels = pixels.to(next(self.model.parameters()).dtype)
        tokens = self.model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        return F.normalize(wide(tokens[:, 0]), dim=-1)


class ClipFeatures(nn.Module):
    """CLIP's embedding of images (Radford et al., arXiv 2103.00020): `(N, 3, H, W)` in [0, 1] -> unit vectors `(N, D)`.

    Args:
        reward: Whose they are, for messages.
        checkpoint: Hub id or local folder of a transformers CLIPModel.

    Raises:
        UsageError: It does not exist or holds another model.
    """

    def __init__(self, reward: str, checkpoint: str) -> None:
        super().__init__()
        with loading(f"{reward}: checkpoint={checkpoint!r}", "hub id or folder of a transformers CLIPModel"):
            model = load_pretrained(CLIPModel, checkpoint)
        self.vision, self.projection = model.vision_model, InFloat32(model.visual_projection)
        side = model.config.vision_config.image_size
        self.preprocess = Preprocess(size=(side, side))

    def forward(self, frames: Tensor) -> Tensor:
        pixels = self.preprocess(frames).to(next(self.vision.parameters()).dtype)
        return F.normalize(self.projection(self.vision(pixel_values=pixels).pooler_output), dim=-1)


class Consistency(SampledReward):
    """Base of VBench's consistencies: of the features of a video's frames, see `consistency`; prompts are ignored.

    Args:
        name: What messages call the reward.
        features: Frames `(N, 3, H, W)` in [0, 1] -> unit vectors `(N, D)`.
        frames: As for `SampledReward`.
    """

    def __init__(self, name: str, features: nn.Module, frames: Frames) -> None:
        super().__init__(frames=frames)
        self.name, self.features = name, features
        self.requires_grad_(False).eval()

    def score_video(self, video: Tensor, prompts: list[str]) -> Tensor:
        if video.shape[1] < 2:
            raise UsageError(f"{self.name}: expected a video of which 2 frames or more are read, got 1")
        return consistency(self.features(video.flatten(0, 1)).unflatten(0, video.shape[:2]))


def consistency(features: Tensor) -> Tensor:
    """Unit vectors of the frames of videos `(B, n, D)`, n at least 2 -> VBench's consistency `(B,)` in [0, 1].

    The mean over all frames but the first of the mean of two cosine similarities, to the frame before and to the first
    one, each 0 where it is negative (Huang et al., arXiv 2311.17982).
    """
    before = (features[:, 1:] * features[:, :-1]).sum(-1).clamp(min=0)
    first = (features[:, 1:] * features[:, :1]).sum(-1).clamp(min=0)
    return ((before + first) / 2).mean(1)

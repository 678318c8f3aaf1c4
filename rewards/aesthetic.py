"""LAION's aesthetic predictor: how much people like an image, whatever it shows."""

from __future__ import annotations

from urllib.parse import quote

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from chopgrad_align import FrameReward, Frames

from .checkpoints import load_pretrained, load_weights, loading, locate
from .precision import InFloat32
from .preprocess import Preprocess

_HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"
_COMMIT = "6934dd81792f086e613a121dbce43082cb8be85e"


class Aesthetic(FrameReward):
    """LAION-Aesthetics V2 (Schuhmann 2022, github.com/christophschuhmann/improved-aesthetic-predictor).

    An affine map, stored as five linear layers, of the normalised CLIP ViT-L/14 image embedding, fitted to people's
    ratings from 1 to 10: about 5 for an average photograph, 6.5 and more for the best, unbounded when optimised.
    Prompts are ignored. Preprocessing is CLIP's: shortest side to the model's size (bicubic), centre crop, OpenAI's
    mean and deviation.

    Args:
        clip: Hub id or local folder of a transformers `CLIPModel`. The official head belongs to ViT-L/14.
        head: Address, hub id or local folder of `sac+logos+ava1-l14-linearMSE.pth`, or the path of such a file (a
            safetensors file with the same keys, `layers.0.weight` to `layers.7.bias`, is taken too). The default is the
            author's own file, which is downloaded once to `torch.hub`'s folder.
        frames, frames_per_chunk: As for `FrameReward`.

    Raises:
        UsageError: A checkpoint is missing, unreachable, or head and model do not fit together.
    """

    def __init__(
        self,
        *,
        clip: str = "openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41",
        head: str = f"https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/{_COMMIT}/{quote(_HEAD_FILE)}",
        frames: Frames = None,
        frames_per_chunk: int = 8,
    ) -> None:
        super().__init__(frames=frames, frames_per_chunk=frames_per_chunk)
        with loading(f"aesthetic: clip={clip!r}", "hub id or folder of a transformers CLIPModel"):
            model = load_pretrained(CLIPModel, clip)
        self.vision, self.projection = model.vision_model, InFloat32(model.visual_projection)
        side = model.config.vision_config.image_size
        self.preprocess = Preprocess(size=(side, side))
        head_layers = Head(model.config.projection_dim)
        with loading(
            f"aesthetic: head={head!r}", f"address, hub id, folder or path of {_HEAD_FILE}, for the same CLIP model"
        ):
            load_weights(head_layers, locate(head, _HEAD_FILE))
        self.head = InFloat32(head_layers)
        self.requires_grad_(False).eval()

    def score_frames(self, frames: Tensor, prompts: list[str]) -> Tensor:
        pixels = self.preprocess(frames).to(next(self.vision.parameters()).dtype)
        embedding = self.projection(self.vision(pixel_values=pixels).pooler_output)
        return self.head(F.normalize(embedding, dim=-1)).squeeze(-1)


class Head(nn.Module):
    """Features `(N, width)` -> `(N, 1)`, by the layers of LAION's predictor; ImageReward has the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(  # dropout, which only training needs, keeps the numbers of the official layers
            nn.Linear(width, 1024), nn.Dropout(0.2),
            nn.Linear(1024, 128), nn.Dropout(0.2),
            nn.Linear(128, 64), nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, embedding: Tensor) -> Tensor:
        return self.layers(embedding)

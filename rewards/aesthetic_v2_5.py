"""Aesthetic Predictor V2.5: how much people like an image, by SigLIP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipModel

from chopgrad_align import FrameReward, Frames

from .checkpoints import load_pretrained, load_weights, loading, locate
from .precision import InFloat32, wide
from .preprocess import Preprocess

_HEAD_FILE = "aesthetic_predictor_v2_5.pth"
_COMMIT = "c0e15567fa61252cbff43d70c49a8bd27202ca9a"
_HALF = (0.5, 0.5, 0.5)


class AestheticV25(FrameReward):
    """Aesthetic Predictor V2.5 (discus0434 2024, github.com/discus0434/aesthetic-predictor-v2-5).

    An affine map, stored as five linear layers, of the normalised SigLIP so400m (patch 14, 384 pixels) image embedding,
    fitted to ratings from 1 to 10; its author calls 5.5 and more good. Unbounded when optimised. Prompts are ignored.
    Preprocessing is SigLIP's: squashed to a square of the model's size (bicubic), mean and deviation 0.5.

    Args:
        siglip: Hub id or local folder of a transformers `SiglipModel`. The official head belongs to so400m.
        head: Address, hub id or local folder of `aesthetic_predictor_v2_5.pth`, or the path of such a file (a
            safetensors file with the same keys, `scoring_head.0.weight` to `scoring_head.8.bias`, is taken too). The
            default is the author's own file, which is downloaded once to `torch.hub`'s folder.
        frames, frames_per_chunk: As for `FrameReward`.

    Raises:
        UsageError: A checkpoint is missing, unreachable, or head and model do not fit together.
    """

    def __init__(
        self,
        *,
        siglip: str = "google/siglip-so400m-patch14-384@9fdffc58afc957d1a03a25b10dba0329ab15c2a3",
        head: str = f"https://github.com/discus0434/aesthetic-predictor-v2-5/raw/{_COMMIT}/models/{_HEAD_FILE}",
        frames: Frames = None,
        frames_per_chunk: int = 8,
    ) -> None:
        super().__init__(frames=frames, frames_per_chunk=frames_per_chunk)
        with loading(f"aesthetic_v2_5: siglip={siglip!r}", "hub id or folder of a transformers SiglipModel"):
            self.vision = load_pretrained(SiglipModel, siglip).vision_model
        side = self.vision.config.image_size
        self.preprocess = Preprocess(size=(side, side), resize="squash", mean=_HALF, std=_HALF)
        head_layers = _Head(self.vision.config.hidden_size)
        expected = f"address, hub id, folder or path of {_HEAD_FILE}, for the same SigLIP model"
        with loading(f"aesthetic_v2_5: head={head!r}", expected):
            load_weights(head_layers, locate(head, _HEAD_FILE))
        self.head = InFloat32(head_layers)
        self.requires_grad_(False).eval()

    def score_frames(self, frames: Tensor, prompts: list[str]) -> Tensor:
        pixels = self.preprocess(frames).to(next(self.vision.parameters()).dtype)
        embedding = wide(self.vision(pixel_values=pixels).pooler_output)
        return self.head(F.normalize(embedding, dim=-1)).squeeze(-1)


class _Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scoring_head = nn.Sequential(  # dropout, which only training needs, keeps the official layers' numbers
            nn.Linear(width, 1024), nn.Dropout(0.5),
            nn.Linear(1024, 128), nn.Dropout(0.5),
            nn.Linear(128, 64), nn.Dropout(0.5),
            nn.Linear(64, 16), nn.Dropout(0.2),
            nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, embedding: Tensor) -> Tensor:
        return self.scoring_head(embedding)

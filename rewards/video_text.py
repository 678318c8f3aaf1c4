"""Video-text similarity: how well a whole video matches its prompt, its motion included, by a small model."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from chopgrad_align import Frames, SampledReward

from .checkpoints import load_weights, loading
from .precision import in_float32
from .preprocess import Preprocess
from .prompt_cache import PromptCache

WAVES = 4


class SpaceTimeBlock(nn.Module):
    """A convolution in space that halves frames, then a residual one in time: R(2+1)D (Tran et al., "A Closer
    Look at Spatiotemporal Convolutions for Action Recognition", arXiv 1711.11248) with GroupNorm and GELU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.space = nn.Conv3d(inputs, outputs, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        self.norm = nn.GroupNorm(8, outputs)
        self.time = nn.Conv3d(outputs, outputs, (3, 1, 1), padding=(1, 0, 0))
        self.time_norm = nn.GroupNorm(8, outputs)

    def forward(self, video: Tensor) -> Tensor:
        video = F.gelu(self.norm(self.space(video)))
        return video + F.gelu(self.time_norm(self.time(video)))


def transformer_layer(width: int) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        width, nhead=4, dim_feedforward=2 * width, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
    )


def cosines(frames: int, count: int) -> Tensor:
    """The first `count` functions of the discrete cosine transform over the frames of a video, `(frames, count)`."""
    time = (torch.arange(frames) + 0.5) / frames
    return (torch.pi * time[:, None] * torch.arange(count)).cos()


class KeyPoints(nn.Module):
    """Place of what is looked for in each frame, its spread, and its change: means over maps
    that are a softmax over all places (Finn et al., "Deep Spatial Autoencoders for Visuomotor Learning", arXiv
    1509.06113)."""

    def __init__(self, inputs: int, count: int) -> None:
        super().__init__()
        self.maps = nn.Conv3d(inputs, count, 1)

    def forward(self, features: Tensor, change: Tensor) -> Tensor:
        """Features `(B, inputs, F, h, w)` and the change at their places `(B, F, h, w)` -> `(B, F, 4 count)`."""
        maps = self.maps(features).flatten(3)
        maps = maps.softmax(-1, dtype=torch.promote_types(maps.dtype, torch.float32))
        axes = (torch.linspace(-1, 1, side).to(maps) for side in features.shape[-2:])
        y, x = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
        mean_y, mean_x = (maps * y).sum(-1), (maps * x).sum(-1)
        spread = (maps * (y.square() + x.square())).sum(-1) - mean_y.square() - mean_x.square()
        changed = (maps * change.flatten(2).unsqueeze(1)).sum(-1)
        return torch.cat([mean_y, mean_x, spread, changed], 1).transpose(1, 2)


def change(video: Tensor, size: tuple[int, int]) -> Tensor:
    """How much each part of a frame differs from the frame before, noise of single pixels averaged away: root mean
    square over the part and the colours of `video` `(B, 3, F, H, W)`; `(B, F, *size)`, 0 in the first frame.

    What turns in its place changes neither its place nor its size, but this.
    """
    video = video.to(torch.promote_types(video.dtype, torch.float32))  # small differences of large numbers
    coarse = F.avg_pool3d(video, (1, 4, 4))
    squared = coarse.diff(dim=2, prepend=coarse[:, :, :1]).square().mean(1)
    return (F.adaptive_avg_pool2d(squared, size) + 1e-4).sqrt() - 1e-2


class VideoTextModel(nn.Module):
    """Two towers into one space: all frames of a video, in order, and the words of a text.

    The video tower makes frames smaller, block by block. What the last block finds, averaged over the frame, and the
    key points of the block before are a frame's vector. A transformer reads those of all frames, and their slowest
    waves in time, such as from left to right or from small to large and back, make the video's vector.

    Args:
        size: Height and width of the frames.
        widths: Channels of the blocks.
        points: Key points.
        width: Of both transformers, and dimension of the common space.
        vocabulary: Number of tokens.
        length: Most tokens of a text.
    """

    def __init__(self, *, size: int, widths: list[int], points: int, width: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.size, self.length = size, length
        self.blocks = nn.ModuleList(map(SpaceTimeBlock, [3, *widths], widths))
        self.points = KeyPoints(widths[-2], points)
        self.to_frame = nn.Linear(widths[-1] + 4 * points, width)
        self.frames = transformer_layer(width)
        self.to_video = nn.Linear(WAVES * width, width)
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.words = transformer_layer(width)
        self.to_text = nn.Linear(width, width)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_video(self, video: Tensor) -> Tensor:
        """`(B, F, 3, size, size)` in [-1, 1] -> unit vectors `(B, width)`, in float32 at least."""
        video = hidden = video.transpose(1, 2)
        for block in self.blocks:
            before, hidden = hidden, block(hidden)
        content = hidden.mean((3, 4)).transpose(1, 2)
        height, width = before.shape[-2:]
        points = self.points(before, 10 * change(video, (height, width)))
        frames = self.to_frame(torch.cat([content, points.to(content)], -1))
        waves = cosines(frames.shape[1], WAVES).to(frames)
        frames = self.frames(frames + F.pad(waves, (0, frames.shape[-1] - WAVES)))
        slow = torch.einsum("bfd,fw->bwd", frames, waves) / frames.shape[1]
        return F.normalize(in_float32(self.to_video, slow.flatten(1)), dim=-1)

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Ids `(N, L)` and what of them is text, 1 or 0 -> unit vectors `(N, width)`, in float32 at least."""
        hidden = self.token(tokens) + self.position[: tokens.shape[1]]
        hidden = self.words(hidden, src_key_padding_mask=mask == 0)
        weights = (mask / mask.sum(1, keepdim=True)).unsqueeze(-1).to(hidden)
        return F.normalize(in_float32(self.to_text, (hidden * weights).sum(1)), dim=-1)


class VideoText(SampledReward):
    """Cosine similarity of a video and its prompt in the space of a small model of both, in [-1, 1].

    The model reads the frames together and in order, so that what it likes is a video: a still picture of a heart that
    should grow, or one that shrinks, scores less than one that grows.

    Args:
        checkpoint: None for the model that comes with this package (it knows the embedded pipeline's captions only); or
            a folder that holds the arguments of `VideoTextModel` in `config.json`, its weights in `model.safetensors`
            and the files of a transformers tokenizer.
        frames: As for `SampledReward`; the embedded model was trained on all 17 of a clip.

    Raises:
        UsageError: The checkpoint does not exist or holds something else.
    """

    def __init__(self, *, checkpoint: str | None = None, frames: Frames = None) -> None:
        super().__init__(frames=frames)
        folder = Path(checkpoint or str(files("chopgrad_align") / "embedded" / "video_reward")).expanduser()
        with loading(f"video_text: checkpoint={checkpoint!r}", "a folder with config.json and model.safetensors"):
            self.model = VideoTextModel(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
            load_weights(self.model, folder / "model.safetensors")
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder))
        size = self.model.size
        self.preprocess = Preprocess((size, size), "squash", mean=(0.5,) * 3, std=(0.5,) * 3)
        self._texts = PromptCache(self._encode_texts)
        self.requires_grad_(False).eval()

    def score_video(self, video: Tensor, prompts: list[str]) -> Tensor:
        frames = self.preprocess(video.flatten(0, 1)).to(self.model.to_text.weight.dtype)
        vectors = self.model.encode_video(frames.unflatten(0, video.shape[:2]))
        return (vectors * self._texts(prompts).to(vectors)).sum(-1)

    def _encode_texts(self, prompts: list[str]) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": self.model.length, "return_tensors": "pt"}
        tokens = self.tokenizer(prompts, **options).to(self.model.to_text.weight.device)
        return self.model.encode_text(tokens.input_ids, tokens.attention_mask)

"""CLIPScore: how well each frame matches its prompt, by any open_clip model."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Literal

import open_clip
import torch.nn.functional as F
from torch import Tensor, nn

from chopgrad_align import FrameReward, Frames, UsageError
from chopgrad_align.common.arguments import nearest

from .checkpoints import HUB_ID, loading
from .precision import wide
from .preprocess import Preprocess, Resampling
from .prompt_cache import PromptCache
from .prompt_length import LengthWarning


class ImageTextSimilarity(nn.Module):
    """Cosine similarity of frames and texts in an open_clip model, which must have weights.

    Args:
        reward: The published name of who asks, for messages.
        model: Name of an open_clip architecture, `hf-hub:owner/name` or `local-dir:path`.
        pretrained: For an architecture: tag or file of its weights.
        resize: Overrides the resize mode of the model's own preprocessing.
        resampling: As for `Preprocess`.
    """

    def __init__(
        self,
        reward: str,
        model: str,
        pretrained: str | None,
        resize: Literal["shortest", "longest", "squash"] | None = None,
        resampling: Resampling = "pil",
    ) -> None:
        super().__init__()
        self.model = open_clip.create_model(model, pretrained=pretrained, require_pretrained=True)
        self.tokenizer = open_clip.get_tokenizer(model)
        config = open_clip.get_model_preprocess_cfg(self.model)
        size = config["size"]
        self.preprocess = Preprocess(
            size=(size, size) if isinstance(size, int) else tuple(size),
            resize=resize or config["resize_mode"],
            interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            fill=config["fill_color"] / 255,
            resampling=resampling,
        )
        self._length = LengthWarning(reward, self.tokenizer.context_length)
        self.texts = PromptCache(self._encode_texts)

    def forward(self, frames: Tensor, prompts: list[str]) -> Tensor:
        """`(N, 3, H, W)` in [0, 1] and N texts -> `(N,)` in [-1, 1]."""
        weight = next(self.model.parameters())
        image = wide(self.model.encode_image(self.preprocess(frames).to(weight.dtype), normalize=False))
        return (F.normalize(image, dim=-1) * self.texts(prompts).to(image)).sum(-1)

    def _encode_texts(self, texts: list[str]) -> Tensor:
        if self._length.due:  # a text that fits leaves room for the padding of an empty one
            empty, *ends = self.tokenizer(["", *texts], context_length=self._length.tokens + 1)[:, -1].tolist()
            self._length.tell(sum(end != empty for end in ends), len(texts))
        tokens = self.tokenizer(texts).to(next(self.model.parameters()).device)
        return F.normalize(wide(self.model.encode_text(tokens, normalize=False)), dim=-1)


class ClipScore(FrameReward):
    """Cosine similarity of frame and prompt in CLIP's space, in [-1, 1]; no rescaling, no clipping at 0.

    Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning" (EMNLP 2021), without their
    factor 2.5. Preprocessing is the model's own, from its open_clip configuration.

    Args:
        checkpoint: None for the small model that comes with this package (it knows the embedded pipeline's captions
            only); a local folder in open_clip's format (`open_clip_config.json`, `open_clip_model.safetensors`, and
            tokenizer files if it has its own); a hub id, e.g. `hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K`; or the
            name of an open_clip architecture, e.g. `ViT-B-32`, together with `pretrained`.
        pretrained: With an architecture: a tag that open_clip knows (`laion2b_s34b_b79k`) or a local weights file
            (safetensors, or a torch file, which is read with `weights_only=True`).
        frames, frames_per_chunk: As for `FrameReward`.

    Raises:
        UsageError: The checkpoint does not exist, cannot be reached or holds something else.
    """

    def __init__(
        self,
        *,
        checkpoint: str | None = None,
        pretrained: str | None = None,
        frames: Frames = None,
        frames_per_chunk: int = 8,
    ) -> None:
        super().__init__(frames=frames, frames_per_chunk=frames_per_chunk)
        name = _open_clip_name(checkpoint, pretrained)
        given = f"clip_score: checkpoint={checkpoint!r}" + (f", pretrained={pretrained!r}" if pretrained else "")
        with loading(
            given, "a folder or hub id ('hf-hub:owner/name') in open_clip's format, or an architecture's name"
        ):
            self.similarity = ImageTextSimilarity("clip_score", name, pretrained)
        self.requires_grad_(False).eval()

    def prepare_prompts(self, prompts: list[str]) -> None:
        self.similarity.texts(prompts)

    def score_frames(self, frames: Tensor, prompts: list[str]) -> Tensor:
        return self.similarity(frames, prompts)


def _open_clip_name(checkpoint: str | None, pretrained: str | None) -> str:
    """The spelling that open_clip understands, after checks of the mistakes whose remedy can be told."""
    if checkpoint is None:
        checkpoint = str(files("chopgrad_align") / "embedded" / "reward")
    path = Path(checkpoint).expanduser()
    is_hub, is_folder = checkpoint.startswith("hf-hub:"), path.is_dir()
    if pretrained is not None and (is_hub or is_folder):
        raise UsageError(f"clip_score: checkpoint={checkpoint!r} has its own weights, so leave `pretrained` out")
    if is_hub:
        return checkpoint
    if is_folder:
        return f"local-dir:{path}"
    architectures = open_clip.list_models()
    if checkpoint not in architectures:
        hint = nearest(checkpoint, architectures)
        if re.fullmatch(HUB_ID, checkpoint):
            hint = f"; for a model on the hub write 'hf-hub:{checkpoint}'"
        raise UsageError(
            f"clip_score: checkpoint={checkpoint!r} is neither a folder nor an architecture that open_clip knows{hint}"
        )
    tags = open_clip.list_pretrained_tags_by_model(checkpoint)
    if pretrained is None or not (pretrained in tags or Path(pretrained).is_file()):
        known = f" or one of its tags, such as {', '.join(tags[:6])}" if tags else ""
        raise UsageError(
            f"clip_score: checkpoint={checkpoint!r} with pretrained={pretrained!r}: expected a weights file{known}"
        )
    return checkpoint

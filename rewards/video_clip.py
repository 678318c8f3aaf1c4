"""Video CLIP: how well a video matches its prompt, by a model that reads the frames together."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, VideoMAEImageProcessor, XCLIPModel

from chopgrad_align import FrameSampler

from .checkpoints import at, load_pretrained, loading
from .precision import wide
from .preprocess import Preprocess
from .prompt_cache import PromptCache
from .prompt_length import CuttingTokenizer
from .whole_video import WholeVideoReward, recompute_blocks


@dataclass(frozen=True)
class PartCentres(FrameSampler):
    """The middle frame of each of `count` equal parts; all frames if there are fewer."""

    count: int

    def indices(self, total: int, seed: int = 0) -> list[int]:
        return sorted(set(part_centres(total, self.count)))


def part_centres(total: int, count: int) -> list[int]:
    """Middle frames of `count` equal parts of `total` frames; some repeat where there are fewer frames."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


class VideoClip(WholeVideoReward):
    """X-CLIP (Ni et al., "Expanding Language-Image Pretrained Models for General Video Recognition", arXiv 2208.02816).

    The score is the cosine similarity of video and prompt, in [-1, 1], without the model's temperature. The prompt's
    vector is adapted to the video's patches first, by the model's prompt generator. Preprocessing is the checkpoint's
    own (`preprocessor_config.json`: shortest side to 224, bilinear, centre crop, ImageNet's mean and deviation). The
    model reads as many frames as it was made for (8 for xclip-base-patch32), each from the middle of one of as many
    equal parts of the video, as in the official test; a shorter video repeats frames.

    Args:
        checkpoint: Hub id or local folder of a transformers `XCLIPModel` with its tokenizer and processor.

    Raises:
        UsageError: The checkpoint is missing, unreachable or another one.
    """

    def __init__(self, *, checkpoint: str = "microsoft/xclip-base-patch32") -> None:
        super().__init__()
        with loading(f"video_clip: checkpoint={checkpoint!r}", "hub id or folder of a transformers XCLIPModel"):
            self.model = load_pretrained(XCLIPModel, checkpoint)
            self.preprocess = Preprocess.of(VideoMAEImageProcessor.from_pretrained(**at(checkpoint)))
            tokenizer = AutoTokenizer.from_pretrained(**at(checkpoint))
        length = self.model.config.text_config.max_position_embeddings
        self.tokenizer = CuttingTokenizer(tokenizer, "video_clip", length)
        recompute_blocks(self.model.vision_model.encoder.layers)
        self.count = self.model.config.vision_config.num_frames
        self.frames = PartCentres(self.count)
        self._texts = PromptCache(self._encode_texts)
        self.requires_grad_(False).eval()

    def prepare_prompts(self, prompts: list[str]) -> None:
        self._texts(prompts)

    def score_sample(self, frames: Tensor, prompt: str) -> Tensor:
        model = self.model
        pixels = self.preprocess(frames[part_centres(len(frames), self.count)]).to(model.visual_projection.weight.dtype)
        output = model.get_video_features(pixels.unsqueeze(0))
        video = output.pooler_output
        patches = model.prompts_visual_layernorm(output.last_hidden_state[:, 1:]) @ model.prompts_visual_projection
        text = self._texts([prompt]).to(video).unsqueeze(0)
        text = text + model.prompts_generator(text, patches.mean(0, keepdim=True))
        return F.cosine_similarity(wide(video[0]), wide(text[0, 0]), dim=-1).squeeze(0)

    def _encode_texts(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts, padding=True)
        device = self.model.text_projection.weight.device
        tokens = {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
        return self.model.get_text_features(**tokens).pooler_output

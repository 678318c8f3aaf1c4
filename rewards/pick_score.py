"""PickScore: which of two images of a prompt would people choose, learned from the Pick-a-Pic data."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from chopgrad_align import FrameReward, Frames

from .checkpoints import at, load_pretrained, loading
from .precision import InFloat32, wide
from .preprocess import Preprocess
from .prompt_cache import PromptCache
from .prompt_length import CuttingTokenizer


class PickScore(FrameReward):
    """Kirstain et al., "Pick-a-Pic" (arXiv 2305.01569): CLIP ViT-H/14, fine-tuned on people's choices.

    The score is the cosine similarity of a frame and its own prompt, times the model's `exp(logit_scale)` (100 in the
    official checkpoint) as in the authors' example: there in [-100, 100], in practice about 17 to 24. Preprocessing is
    CLIP's: shortest side to the model's size (bicubic), centre crop, OpenAI's mean and deviation.

    Args:
        checkpoint: Hub id or local folder of a transformers `CLIPModel`.
        processor: Hub id or local folder of its tokenizer; the official checkpoint takes that of the model that it was
            trained from.
        frames, frames_per_chunk: As for `FrameReward`.

    Raises:
        UsageError: The checkpoint or the tokenizer is missing, unreachable or of another model.
    """

    def __init__(
        self,
        *,
        checkpoint: str = "yuvalkirstain/PickScore_v1@a4e4367c6dfa7288a00c550414478f865b875800",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K@1c2b8495b28150b8a4922ee1c8edee224c284c0c",
        frames: Frames = None,
        frames_per_chunk: int = 8,
    ) -> None:
        super().__init__(frames=frames, frames_per_chunk=frames_per_chunk)
        with loading(f"pick_score: checkpoint={checkpoint!r}", "hub id or folder of a transformers CLIPModel"):
            self.clip = load_pretrained(CLIPModel, checkpoint)
        self.clip.visual_projection = InFloat32(self.clip.visual_projection)
        self.clip.text_projection = InFloat32(self.clip.text_projection)
        with loading(f"pick_score: processor={processor!r}", "hub id or folder of the model's tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(**at(processor))
        length = self.clip.config.text_config.max_position_embeddings
        self.tokenizer = CuttingTokenizer(tokenizer, "pick_score", length)
        side = self.clip.config.vision_config.image_size
        self.preprocess = Preprocess(size=(side, side), odd="down")
        self._texts = PromptCache(self._encode_texts)
        self.requires_grad_(False).eval()

    def prepare_prompts(self, prompts: list[str]) -> None:
        self._texts(prompts)

    def score_frames(self, frames: Tensor, prompts: list[str]) -> Tensor:
        pixels = self.preprocess(frames).to(self.clip.logit_scale.dtype)
        image = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)
        similarity = (F.normalize(image, dim=-1) * self._texts(prompts).to(image)).sum(-1)
        return wide(self.clip.logit_scale).exp() * similarity

    def _encode_texts(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts, padding=True).to(self.clip.logit_scale.device)
        output = self.clip.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return F.normalize(self.clip.text_projection(output.pooler_output), dim=-1)

"""The answer of a vision-language model to a question that the user writes, about frames or about a clip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from chopgrad_align import Frames, UsageError

from .checkpoints import at, load_pretrained, loading
from .precision import wide
from .preprocess import Preprocess
from .qwen_vision import to_patches
from .whole_video import WholeVideoReward, recompute_blocks

_SECONDS = 0.5  # between two frames of a clip, as the official processor takes them if nothing else is said


class VLMQuestion(WholeVideoReward):
    """Expected value of a vision-language model's answer, Qwen2.5-VL's (Bai et al., arXiv 2502.13923).

    The model reads frames and a question, in its own chat format. Its next token is asked for: with p of the answers,
    normalised over them, the score is `Σ value · p`. For yes and no, which is the default, that is the probability of
    yes (as VQAScore, Lin et al., arXiv 2404.01291, but for the normalisation); with digits it is an expected rating.

    Preprocessing is the official one, on tensors: resized (bicubic) to multiples of 28 pixels with about the shape of
    the video and as many pixels as the checkpoint's processor allows, normalised, patches of 2 x 14 x 14.

    Args:
        question: `{prompt}` in it is the prompt of the video: `Does this show "{prompt}"? Answer with yes or no.`
        answers: The value of each answer, each of one token of the model: `{Yes: 1, No: 0}`, or `{"1": 1, …, "5": 5}`.
        of: `"frames"`: every frame that is read is a picture of its own and has a score, which `reduce` makes one of;
            `"clip"`: they are a video, half a second from frame to frame as far as the model is told.
        frames: As for `SampledReward`.
        max_pixels: Most pixels of a resized frame; None: as the checkpoint's processor says.
        checkpoint: Hub id or local folder of a Qwen2.5-VL with its processor.
        dtype: Of the weights; the answers' logits are computed in float32.

    Raises:
        UsageError: The checkpoint does not exist or is another model, an answer is not one token of it, or an argument
            is out of range.
    """

    def __init__(
        self,
        *,
        question: str,
        answers: Mapping[str, float] | None = None,
        of: Literal["frames", "clip"] = "frames",
        frames: Frames = 4,
        max_pixels: int | None = None,
        checkpoint: str = "Qwen/Qwen2.5-VL-3B-Instruct",
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    ) -> None:
        super().__init__(frames=frames)
        self.question, self.of = question, of
        values = {"Yes": 1.0, "No": 0.0} if answers is None else {str(key): value for key, value in answers.items()}
        if of not in ("frames", "clip"):
            raise UsageError(f"vlm_question: of={of!r}: expected 'frames' or 'clip'")
        if dtype not in ("bfloat16", "float16", "float32"):
            raise UsageError(f"vlm_question: dtype={dtype!r}: expected bfloat16, float16 or float32")
        if len(values) < 2 or not all(isinstance(value, int | float) for value in values.values()):
            raise UsageError(f"vlm_question: answers={answers!r}: expected two answers or more, each with a number")
        with loading(f"vlm_question: checkpoint={checkpoint!r}", "hub id or folder of a Qwen2.5-VL"):
            self.processor: Any = Qwen2_5_VLProcessor.from_pretrained(**at(checkpoint))
            self.model: Any = load_pretrained(Qwen2_5_VLForConditionalGeneration, checkpoint, getattr(torch, dtype))
        self.answers = [self._token(answer) for answer in values]
        if len(set(self.answers)) < len(self.answers):
            raise UsageError(f"vlm_question: answers={answers!r}: two of them begin alike for the model")
        self.values = [float(value) for value in values.values()]
        images = self.processor.image_processor if of == "frames" else self.processor.video_processor
        self.min_pixels, most = images.size["shortest_edge"], images.size["longest_edge"]
        self.max_pixels = most if max_pixels is None else max_pixels
        if self.max_pixels < self.min_pixels:
            raise UsageError(f"vlm_question: max_pixels={max_pixels}: expected {self.min_pixels} or more")
        self.normalisation = tuple(images.image_mean), tuple(images.image_std)
        recompute_blocks(self.model.model.visual.blocks, self.model.model.language_model.layers)
        self.requires_grad_(False).eval()

    def _token(self, answer: str) -> int:
        ids = self.processor.tokenizer.encode(answer, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self.processor.tokenizer.unk_token_id:
            raise UsageError(
                f"vlm_question: answers: {answer!r} is {len(ids)} tokens of the model, expected one that it knows: a "
                "short word or a digit"
            )
        return ids[0]

    def score_sample(self, frames: Tensor, prompt: str) -> Tensor:
        """Scores of `frames` `(n, 3, H, W)` in [0, 1]: one a frame `(n,)`, or a scalar of the clip."""
        if self.of == "clip":
            return self._answer(frames, prompt)
        if not (frames.requires_grad and torch.is_grad_enabled() and len(frames) > 1):
            return torch.stack([self._answer(frame, prompt) for frame in frames.split(1)])
        return torch.stack([checkpoint(self._answer, f, prompt, use_reentrant=False) for f in frames.split(1)])

    def _answer(self, frames: Tensor, prompt: str) -> Tensor:
        """The expected value of the answer about a picture or clip `(n, 3, H, W)`."""
        model, kind = self.model.model, "image" if self.of == "frames" else "video"
        patches, grid = self.patchify(frames)
        token, count = f"<|{kind}_pad|>", math.prod(grid.tolist()) // model.config.vision_config.spatial_merge_size**2
        before, after = self._text(kind, prompt).split(token)
        ids = self.processor.tokenizer(before + token * count + after, return_tensors="pt")["input_ids"].to(
            frames.device
        )
        seen = (ids == self.processor.tokenizer.convert_tokens_to_ids(token)).int()
        patches, grid = patches.to(next(self.parameters()).dtype), grid.to(frames.device).unsqueeze(0)
        if kind == "image":
            inputs = {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": seen}
        else:
            seconds = _SECONDS * model.config.vision_config.temporal_patch_size
            inputs = {"pixel_values_videos": patches, "video_grid_thw": grid, "mm_token_type_ids": 2 * seen}
            inputs["second_per_grid_ts"] = torch.tensor([seconds], device=frames.device)
        hidden = model(input_ids=ids, use_cache=False, **inputs).last_hidden_state[0, -1]
        logits = F.linear(wide(hidden), wide(self.model.lm_head.weight[self.answers]))
        return (logits.softmax(-1) * logits.new_tensor(self.values)).sum()

    def patchify(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The model's input of a picture or clip `(n, 3, H, W)` in [0, 1]; see `to_patches`."""
        vision = self.model.config.vision_config
        patch, merge, tubelet = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        size = smart_resize(*frames.shape[-2:], patch * merge, self.min_pixels, self.max_pixels)
        pixels = Preprocess(size, "squash", "bicubic", *self.normalisation)(frames)
        return to_patches(pixels, patch, merge, tubelet)

    def _text(self, kind: str, prompt: str) -> str:
        question = self.question.replace("{prompt}", prompt)
        if "<|" in prompt:
            raise UsageError(f"vlm_question: the prompt {prompt!r} contains one of the model's special tokens")
        content = [{"type": kind}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

"""VideoReward: visual quality, motion quality and text alignment, as people judge generated videos."""

from __future__ import annotations

import ast
import copy
import json
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from chopgrad_align import FrameSampler, UsageError

from .checkpoints import at, loading, locate, read_weights
from .precision import InFloat32
from .preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess
from .qwen_vision import to_patches
from .whole_video import WholeVideoReward, recompute_blocks

Dimension = Literal["VQ", "MQ", "TA"]

_DIMENSIONS: tuple[Dimension, ...] = ("VQ", "MQ", "TA")
_TOKENS = [f"<|{dimension}_reward|>" for dimension in _DIMENSIONS]
_VIDEO_TOKEN = "<|video_pad|>"
_TEMPLATE = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
_PINNED = {"Qwen/Qwen2-VL-2B-Instruct": "Qwen/Qwen2-VL-2B-Instruct@895c3a49bc3fa70a340399125c650a463535e71c"}
_MIN_PIXELS = 128 * 28 * 28  # of a frame after resizing; the upper bound is in the checkpoint's settings
_MIN_FRAMES, _MAX_FRAMES = 4, 768
# The settings that this file implements, which are those of the published checkpoint.
_SETTINGS: dict[str, dict[str, object]] = {
    "data_config": {"prompt_template_type": "detailed_special", "sample_type": "uniform", "num_frames": None},
    "model_config": {"use_special_tokens": True, "reward_token": "special", "output_dim": 1},
    "peft_lora_config": {"use_rslora": False},
}


@dataclass(frozen=True)
class AtRate(FrameSampler):
    """An even number of evenly spaced frames: `share` of a video's, 4 at least if there are as many, 768 at most."""

    share: float | None
    """None: not known, an error."""

    def indices(self, total: int, seed: int = 0) -> list[int]:
        if self.share is None:
            raise UsageError("video_reward: how many frames a second have the videos? Give fps=… as an argument")
        if total < 2:
            raise UsageError(f"VideoReward: expected a video of 2 frames or more, got {total}")
        most = min(_MAX_FRAMES, total) // 2 * 2
        count = round(min(max(total * self.share, _MIN_FRAMES), most) / 2) * 2
        return torch.linspace(0, total - 1, count).round().long().tolist()


class VideoReward(WholeVideoReward):
    """VideoReward of VideoAlign (Liu et al., "Improving Video Generation with Human Feedback", arXiv 2501.13918).

    Qwen2-VL-2B reads the video and instructions with the prompt in them, which contain three special tokens; a linear
    head on their last hidden states gives visual quality (VQ), motion quality (MQ) and text alignment (TA). Each is
    normalised by the mean and deviation of the checkpoint's settings: about 0 for an average video of the authors, ±1
    a standard deviation, unbounded. The score is the sum of the chosen dimensions; all three make the official
    `Overall`.

    Preprocessing is the official one, on tensors: frames at the settings' rate (2 a second, evenly spaced, 4 at least
    if there are as many, an even number), resized (bicubic) to multiples of 28 pixels with about the shape of the
    video and 100,352 to 200,704 pixels, CLIP's mean and deviation, patches of 2 x 14 x 14.

    Established from the official repository (github.com/KlingAIResearch/VideoAlign) and its issues, without a look at
    the 5 GB file itself: the hub repository `KlingTeam/VideoReward` (earlier `KwaiVGI/VideoReward`) has
    `model_config.json` and `checkpoint-11352/model.pth`, the state of the whole PEFT model under the names of
    transformers 4.45, in bfloat16: base weights, vision tower included, LoRA matrices of rank 64 (alpha 128) beside
    them, `rm_head.weight`. LoRA is added to the weights when loading. Positions of the tokens are 0, 1, 2, … in all
    three dimensions of Qwen2-VL's rotary embedding: the official model passes none, and transformers 4.45, with which
    it was trained, then counts so, unlike later versions.

    Args:
        fps: Frames a second of the videos to score, which the frame sampling depends on. None: those of the file, where
            files are scored, and in training those of the config.
        template: Path of a file of the form of the official `prompt_template.py`, with other instructions; it is read,
            not run. None: the official instructions, which come with this package.
        checkpoint: Hub id or local folder with `model_config.json` and `file`.
        file: Weights in there.
        base: Hub id or local folder of Qwen2-VL, of which the configuration, tokenizer and chat template are read; None
            takes the one that the settings name.
        dimensions: Which of `"VQ"`, `"MQ"`, `"TA"` are summed.

    Raises:
        UsageError: A file is missing, unreachable or another one, the settings are of a model that differs from the
            published one, an argument is out of range, or a video has one frame.
    """

    def __init__(
        self,
        *,
        fps: float | None = None,
        template: str | None = None,
        checkpoint: str = "KlingTeam/VideoReward@4f26600130683e6f1de9f5d463887f28e8ef995c",
        file: str = "checkpoint-11352/model.pth",
        base: str | None = None,
        dimensions: tuple[Dimension, ...] | list[Dimension] = _DIMENSIONS,
    ) -> None:
        super().__init__()
        if fps is not None and fps <= 0:
            raise UsageError(f"video_reward: fps={fps!r}: expected the frames a second of the videos, above 0")
        if not dimensions or not set(dimensions) <= set(_DIMENSIONS) or len(set(dimensions)) != len(dimensions):
            raise UsageError(f"video_reward: dimensions={dimensions!r}: expected some of {', '.join(_DIMENSIONS)}")
        if template is None:
            self.template = files(__package__).joinpath("videoalign", "instructions.txt").read_text(encoding="utf-8")
        else:
            with loading(f"video_reward: template={template!r}", "a file like the official prompt_template.py"):
                self.template = _read_template(Path(template).expanduser())
        self.dimensions = [_DIMENSIONS.index(dimension) for dimension in dimensions]

        expected = f"hub id or folder with model_config.json and {file}, as published"
        with loading(f"video_reward: checkpoint={checkpoint!r}", expected):
            settings = _read_settings(locate(checkpoint, "model_config.json"))
            lora = settings["peft_lora_config"]
            saved = read_weights(locate(checkpoint, file))
            weights = merge_lora(saved, lora["lora_alpha"] / lora["lora_r"])
            head = weights.pop("rm_head.weight")
            statistics = settings["inference_config"]
            self.mean, self.std = ([statistics[f"{d}_{s}"] for d in _DIMENSIONS] for s in ("mean", "std"))
        base = settings["model_config"]["model_name_or_path"] if base is None else base
        base = _PINNED.get(base, base)
        with loading(f"video_reward: base={base!r}", "hub id or folder of the Qwen2-VL that the checkpoint is made of"):
            self.processor: Any = Qwen2VLProcessor.from_pretrained(**at(base))
            config = Qwen2VLConfig.from_pretrained(**at(base))
            self.processor.tokenizer.add_tokens(_TOKENS, special_tokens=True)
            config.text_config.vocab_size = len(self.processor.tokenizer)  # of the base it is larger, for round numbers
            loaded: Any = Qwen2VLModel.from_pretrained(
                None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True
            )
            self.model, info = loaded
            if info["missing_keys"] or info["mismatched_keys"]:
                raise ValueError(f"weights do not fit: {sorted(info['missing_keys'] | info['mismatched_keys'])[0]}")
        linear = nn.Linear(head.shape[1], head.shape[0], bias=False)
        linear.weight = nn.Parameter(head)
        self.head = InFloat32(linear)
        self.max_pixels = settings["data_config"]["max_frame_pixels"]
        self.rate = settings["data_config"]["fps"]
        self.frames = AtRate(None if fps is None else self.rate / fps)
        recompute_blocks(self.model.visual.blocks, self.model.language_model.layers)
        self.requires_grad_(False).eval()

    def at_fps(self, fps: float) -> VideoReward:
        if self.frames != AtRate(None):
            return self
        told = copy.copy(self)  # with the same weights
        told.frames = AtRate(self.rate / fps)
        return told

    def score_sample(self, frames: Tensor, prompt: str) -> Tensor:
        patches, grid = self.patchify(frames)
        ids = self._tokenize(prompt, grid).to(frames.device)
        positions = torch.arange(len(ids), device=frames.device).expand(3, 1, -1)
        hidden = self.model(
            input_ids=ids.unsqueeze(0),
            position_ids=positions,
            pixel_values_videos=patches.to(next(self.parameters()).dtype),
            video_grid_thw=grid.to(frames.device).unsqueeze(0),
            use_cache=False,
        ).last_hidden_state[0]
        special = torch.tensor(self.processor.tokenizer.convert_tokens_to_ids(_TOKENS), device=ids.device)
        found = torch.isin(ids, special)
        if found.sum() != len(special):
            raise UsageError(f"video_reward: the prompt {prompt!r} contains one of the special tokens {_TOKENS}")
        raw = self.head(hidden[found]).squeeze(-1)
        scores = (raw - raw.new_tensor(self.mean)) / raw.new_tensor(self.std)
        return scores[self.dimensions].sum()

    def patchify(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Qwen2-VL's input of `(N, 3, H, W)` in [0, 1], N even; see `to_patches`."""
        vision = self.model.config.vision_config
        patch, merge, tubelet = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        size = smart_resize(*frames.shape[-2:], patch * merge, _MIN_PIXELS, self.max_pixels)
        pixels = Preprocess(size, "squash", "bicubic", OPENAI_MEAN, OPENAI_STD)(frames)
        return to_patches(pixels, patch, merge, tubelet)

    def _tokenize(self, prompt: str, grid: Tensor) -> Tensor:
        instructions = self.template.format(text_prompt=prompt)
        content = [{"type": "video"}, {"type": "text", "text": instructions}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        count = math.prod(grid.tolist()) // self.model.config.vision_config.spatial_merge_size**2
        before, after = text.split(_VIDEO_TOKEN, 1)
        return self.processor.tokenizer(before + _VIDEO_TOKEN * count + after, return_tensors="pt")["input_ids"][0]


def merge_lora(saved: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Plain float32 weights of a state saved from a PEFT model: where there are LoRA matrices, W + scale · B A."""
    prefix = "base_model.model."
    state = {key.removeprefix(prefix): value.float() for key, value in saved.items()}
    weights = {}
    for key, value in state.items():
        if ".lora_" in key or key == "lm_head.weight":  # the language model's head has no part in the score
            continue
        name = key.removesuffix(".base_layer.weight")
        if f"{name}.lora_A.default.weight" in state:
            a, b = (state[f"{name}.lora_{side}.default.weight"] for side in "AB")
            value = value + scale * (b @ a)
        weights[key.replace(".base_layer.", ".")] = value
    return weights


def _read_settings(path: Path) -> dict[str, Any]:
    settings = json.loads(path.read_text())
    for section, expected in _SETTINGS.items():
        for key, value in expected.items():
            if settings[section][key] != value:
                raise ValueError(f"{section}.{key} is {settings[section][key]!r}, not {value!r}")
    return settings


def _read_template(path: Path) -> str:
    for statement in ast.parse(path.read_text()).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))) if name == _TEMPLATE:
                if "{text_prompt}" in text and all(text.count(token) == 1 for token in _TOKENS):
                    return text
    raise ValueError(f"it has no text {_TEMPLATE} with the three special tokens and {{text_prompt}}")

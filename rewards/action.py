"""Action: does the video show a certain action, such as playing the piano."""

from __future__ import annotations

import re
from typing import Literal

from torch import Tensor
from transformers import VideoMAEForVideoClassification, VideoMAEImageProcessor

from chopgrad_align import UsageError, frame_sampler

from .checkpoints import at, load_pretrained, loading
from .precision import InFloat32
from .preprocess import Preprocess
from .whole_video import WholeVideoReward, evenly_spaced, recompute_blocks


class Action(WholeVideoReward):
    """Probability of an action, by VideoMAE (Tong et al., arXiv 2203.12602) fine-tuned on the labels of Kinetics.

    The reward of VADER (Prabhudesai et al., arXiv 2407.08737), whose loss is the negative log-probability of the
    label. Preprocessing is the checkpoint's own (`preprocessor_config.json`: shortest side to 224, bilinear, centre
    crop, ImageNet's mean and deviation), where VADER squashes frames to a square. The model reads 16 frames, evenly
    spaced from the first to the last; a shorter video repeats frames evenly.

    Args:
        checkpoint: Hub id or local folder of a transformers `VideoMAEForVideoClassification` with its processor.
        label: The action, one of the model's labels in any case. None looks for it in each prompt: the longest label
            that occurs there as whole words.
        score: `"log_probability"`, in (-inf, 0], which has a gradient however improbable the action is; or
            `"probability"`, in [0, 1].

    Raises:
        UsageError: The checkpoint is missing, unreachable or another one, the label is not the model's, or a prompt
            has none.
    """

    def __init__(
        self,
        *,
        checkpoint: str = "MCG-NJU/videomae-base-finetuned-kinetics@488eb9a0565f257b32866000305c8178965eb9f6",
        label: str | None = None,
        score: Literal["log_probability", "probability"] = "log_probability",
    ) -> None:
        super().__init__()
        if score not in ("log_probability", "probability"):
            raise UsageError(f"action: score={score!r}: expected 'log_probability' or 'probability'")
        self.log = score == "log_probability"
        with loading(
            f"action: checkpoint={checkpoint!r}", "hub id or folder of a transformers VideoMAEForVideoClassification"
        ):
            self.model = load_pretrained(VideoMAEForVideoClassification, checkpoint)
            self.preprocess = Preprocess.of(VideoMAEImageProcessor.from_pretrained(**at(checkpoint)))
        self.model.classifier = InFloat32(self.model.classifier)
        self.frames = frame_sampler(self.model.config.num_frames)
        recompute_blocks(self.model.videomae.encoder.layer)
        self.classes = {name.lower(): index for name, index in self.model.config.label2id.items()}
        self.label = label
        if label is not None and label.lower() not in self.classes:
            raise UsageError(f"action: label={label!r} is none of the model's labels: {self._examples()}")
        self.requires_grad_(False).eval()

    def score_sample(self, frames: Tensor, prompt: str) -> Tensor:
        pixels = self.preprocess(frames[evenly_spaced(len(frames), self.model.config.num_frames)]).to(
            next(self.model.parameters()).dtype
        )
        log_probability = self.model(pixels.unsqueeze(0)).logits[0].log_softmax(-1)
        score = log_probability[self._class(prompt)]
        return score if self.log else score.exp()

    def _class(self, prompt: str) -> int:
        if self.label is not None:
            return self.classes[self.label.lower()]
        found = [name for name in self.classes if re.search(rf"\b{re.escape(name)}\b", prompt, re.IGNORECASE)]
        if not found:
            raise UsageError(
                f"action: none of the model's labels occurs in the prompt {prompt!r}; "
                f"name one there or give label=…: {self._examples()}"
            )
        return self.classes[max(found, key=len)]

    def _examples(self) -> str:
        return ", ".join(sorted(self.classes)[:5]) + ", …"

"""How surely an object is seen in a frame, by a detector of transformers: what the object rewards share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GroundingDinoForObjectDetection,
    YolosForObjectDetection,
)
from transformers.image_transforms import get_size_with_aspect_ratio

from chopgrad_align import FrameReward, Frames, UsageError
from chopgrad_align.common.arguments import nearest

from .checkpoints import at, load_pretrained, loading
from .precision import InFloat32
from .preprocess import Preprocess


class ObjectReward(FrameReward):
    """Base of the rewards that ask a detector for an object; prompts are ignored.

    Args:
        target: For YOLOS the name of one of its classes (COCO's), for Grounding DINO any short phrase.
        checkpoint: Hub id or local folder of a YOLOS or Grounding DINO model, with its processor; for a phrase e.g.
            `IDEA-Research/grounding-dino-base`.
        temperature: Of the smooth maximum over the detector's queries, in units of log-odds.
        frames, frames_per_chunk: As for `FrameReward`.

    Raises:
        UsageError: As for `ObjectDetector`.
    """

    name: str  # as published

    def __init__(
        self,
        *,
        target: str,
        checkpoint: str = "hustvl/yolos-base",
        temperature: float = 0.25,
        frames: Frames = None,
        frames_per_chunk: int = 8,
    ) -> None:
        super().__init__(frames=frames, frames_per_chunk=frames_per_chunk)
        self.detector = ObjectDetector(self.name, target, checkpoint, temperature)
        self.exact_gradient = self.detector.queries.smooth
        self.requires_grad_(False).eval()


class ObjectDetector(nn.Module):
    """Log-odds that `target` is in a frame: the smooth maximum, over a detector's queries, of theirs.

    A query's probability is the official one: YOLOS, the softmax over its classes and "no object", for the class
    `target`; Grounding DINO, the largest sigmoid over the tokens of the text `target`. The smooth maximum of log-odds
    `z` is `T logsumexp(z / T)`: it rises with each of them, every query has a gradient, and it exceeds the maximum by
    at most `T log(queries)`.

    Preprocessing is the detector's: the shortest side to its size (800 in the official checkpoints, the longest to 1333
    at most; YOLOS: multiples of 16), bilinear, with the mean and deviation of its processor.

    Args:
        reward: What messages call the reward.
        target: For YOLOS the name of one of its classes (COCO's), for Grounding DINO any short phrase.
        checkpoint: Hub id or local folder of a YOLOS or Grounding DINO model, with its processor.
        temperature: T above, in units of log-odds, positive.

    Raises:
        UsageError: The checkpoint is missing, unreachable or another model, YOLOS has no such class, or an argument is
            out of range.
    """

    def __init__(self, reward: str, target: str, checkpoint: str, temperature: float) -> None:
        super().__init__()
        if not target.strip():
            raise UsageError(f"{reward}: target={target!r}: expected the name of an object")
        if not temperature > 0:
            raise UsageError(f"{reward}: temperature={temperature!r}: expected a positive number")
        self.temperature = temperature
        expected = "hub id or folder of a YOLOS or Grounding DINO model of transformers, with its processor"
        with loading(f"{reward}: checkpoint={checkpoint!r}", expected):
            families: dict[str, type[_Yolos | _GroundingDino]] = {"yolos": _Yolos, "grounding-dino": _GroundingDino}
            kind = AutoConfig.from_pretrained(**at(checkpoint)).model_type
            if kind not in families:
                raise ValueError(f"its model type is {kind!r}")
            self.queries: _Yolos | _GroundingDino = families[kind](checkpoint, target, reward)
            processor = AutoImageProcessor.from_pretrained(**at(checkpoint))
        self.shortest, self.longest = processor.size["shortest_edge"], processor.size["longest_edge"]
        self.mean, self.std = tuple(processor.image_mean), tuple(processor.image_std)

    def forward(self, frames: Tensor) -> Tensor:
        """`(N, 3, H, W)` in [0, 1] -> `(N,)`, at least float32."""
        pixels = self.preprocess(frames.shape[-2], frames.shape[-1])(frames)
        log_odds = self.queries(pixels.to(next(self.parameters()).dtype))
        return self.temperature * (log_odds / self.temperature).logsumexp(-1)

    def preprocess(self, height: int, width: int) -> Preprocess:
        """The preprocessing of the detector's processor for a frame of this size."""
        height, width = get_size_with_aspect_ratio((height, width), self.shortest, self.longest)
        step = self.queries.multiple_of
        return Preprocess((height - height % step, width - width % step), "squash", "bilinear", self.mean, self.std)


class _Yolos(nn.Module):
    multiple_of = 16  # the processor's own rule
    smooth = True

    def __init__(self, checkpoint: str, target: str, reward: str) -> None:
        super().__init__()
        self.model = load_pretrained(YolosForObjectDetection, checkpoint)
        self.model.class_labels_classifier = InFloat32(self.model.class_labels_classifier)
        labels = self.model.config.label2id
        if target not in labels:
            hint = nearest(target, labels) or f": {', '.join(sorted(labels))}"
            raise UsageError(
                f"{reward}: target={target!r} is no class of {checkpoint}{hint}; for other objects choose a "
                "Grounding DINO checkpoint, such as 'IDEA-Research/grounding-dino-base'"
            )
        self.label = labels[target]

    def forward(self, pixels: Tensor) -> Tensor:
        """Log-odds `(N, queries)`."""
        logits = self.model(pixel_values=pixels).logits
        others = torch.cat([logits[..., : self.label], logits[..., self.label + 1 :]], -1)
        return logits[..., self.label] - others.logsumexp(-1)


class _GroundingDino(nn.Module):
    multiple_of = 1
    smooth = False  # it ranks the places where an object may be: as two of them change ranks, its output jumps

    def __init__(self, checkpoint: str, target: str, reward: str) -> None:
        super().__init__()
        self.model = load_pretrained(GroundingDinoForObjectDetection, checkpoint)
        self.model.class_embed[-1] = InFloat32(self.model.class_embed[-1])
        tokenizer = AutoTokenizer.from_pretrained(**at(checkpoint))
        # Lower case, closed by a full stop: the form of the captions that it was trained on.
        text = target.strip().lower().rstrip(".") + "."
        self.tokens = dict(tokenizer([text], return_tensors="pt"))

    def forward(self, pixels: Tensor) -> Tensor:
        """Log-odds `(N, queries)`."""
        tokens = {name: ids.to(pixels.device).expand(len(pixels), -1) for name, ids in self.tokens.items()}
        with _Attached():
            return self.model(pixel_values=pixels, **tokens).logits.amax(-1)


class _Attached(TorchFunctionMode):
    """A context in which `detach` cuts nothing.

    transformers' Grounding DINO detaches the queries that it picks and the boxes between the layers of its decoder, as
    it is trained; the gradient would then not be that of the score.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if function is Tensor.detach else function(*args, **(kwargs or {}))

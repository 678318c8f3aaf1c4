"""Temporal consistency: can what is hidden of a video be predicted from the rest of it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import VJEPA2Model, VJEPA2VideoProcessor

from chopgrad_align import frame_sampler
from chopgrad_align.common.arguments import whole_number

from .checkpoints import at, load_pretrained, loading
from .precision import wide
from .preprocess import Preprocess
from .whole_video import WholeVideoReward, recompute_blocks

# Blocks, and the share of a frame's patches in each: V-JEPA's short-range and long-range masks.
_MASKS = ((8, 0.15), (2, 0.7))
_ASPECT_RATIO = (0.75, 1.5)


class TemporalConsistency(WholeVideoReward):
    """V-JEPA 2's feature prediction (Assran et al., arXiv 2506.09985): its pretraining loss, negated.

    VADER (Prabhudesai et al., arXiv 2407.08737) rewards videos so with the first V-JEPA (Bardes et al., arXiv
    2404.08471). Patches are hidden in blocks that span the whole time; the encoder reads the others alone, the
    predictor tells the features of the hidden ones, and the error is the mean absolute difference to the normalised
    features of the whole video, averaged over V-JEPA's two kinds of masks. The score is in (-inf, 0]: 0 for a perfect
    prediction, about -0.8 for one that tells nothing (features have unit variance). Prompts are ignored. The checkpoint
    has one encoder, which reads the context and makes the targets, where pretraining has a moving average for these.

    transformers' `VJEPA2Model.forward` hides patches only after its encoder has seen all of them, so its own error is
    no measure of prediction; here the hidden patches never enter.

    Preprocessing is the checkpoint's own (`video_preprocessor_config.json`: for 256 pixels, shortest side to 292,
    bilinear, centre crop, ImageNet's mean and deviation). The gradient is that of the score, through prediction and
    target both; a video without any content is easy to predict, so this reward wants another one beside it.

    Args:
        checkpoint: Hub id or local folder of a transformers `VJEPA2Model` with its predictor and processor.
        frames: How many evenly spaced frames are read at most; None: as many as the model was trained with. A shorter
            video is read whole, its last frame repeated to an even number (for tubelets of 2).
        seed: Of the masks, which are the same for every video.

    Raises:
        UsageError: The checkpoint is missing, unreachable or has no predictor; an argument is out of range.
    """

    def __init__(
        self,
        *,
        checkpoint: str = "facebook/vjepa2-vitl-fpc64-256@b3c1679b7c34d3255ef3547f27c7b226aefab26f",
        frames: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with loading(
            f"temporal_consistency: checkpoint={checkpoint!r}", "hub id or folder of a transformers VJEPA2Model"
        ):
            self.model = load_pretrained(VJEPA2Model, checkpoint)
            self.preprocess = Preprocess.of(VJEPA2VideoProcessor.from_pretrained(**at(checkpoint)))
        config = self.model.config
        self.tubelet = config.tubelet_size
        frames = config.frames_per_clip if frames is None else whole_number("temporal_consistency: frames", frames)
        self.frames = frame_sampler(frames)
        self.hidden = block_masks(config.crop_size // config.patch_size, seed)
        # Pretraining takes the mask token of the clip length, of which there is one: the first. transformers' predictor
        # always takes the second, which pretraining left untouched.
        with torch.no_grad():
            tokens = self.model.predictor.embeddings.mask_tokens
            tokens[1 % len(tokens)] = tokens[0]
        recompute_blocks(self.model.encoder.layer, self.model.predictor.layer)
        self.requires_grad_(False).eval()

    def score_sample(self, frames: Tensor, prompt: str) -> Tensor:
        missing = -len(frames) % self.tubelet
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        encoder = self.model.encoder
        pixels = self.preprocess(frames).unsqueeze(0)
        features = encoder(pixels).last_hidden_state
        target = F.layer_norm(wide(features), features.shape[-1:])
        patches = encoder.embeddings(pixels)
        errors = []
        for mask in self.hidden:
            hidden = mask.flatten().repeat(len(frames) // self.tubelet).to(frames.device)
            seen, hidden = (kept.nonzero().squeeze(1) for kept in (~hidden, hidden))
            context = patches[:, seen]
            for block in encoder.layer:
                context = block(context, seen.unsqueeze(0))[0]
            context = encoder.layernorm(context)
            # The predictor picks its context out of all patches by their numbers.
            context = torch.zeros_like(features).index_copy(1, seen, context)
            predicted = self.model.predictor(context, [seen.unsqueeze(0)], [hidden.unsqueeze(0)]).last_hidden_state
            errors.append((wide(predicted) - target[:, hidden]).abs().mean())
        return -torch.stack(errors).mean()


def block_masks(side: int, seed: int) -> list[Tensor]:
    """V-JEPA's multi-block masks of a frame of `side` x `side` patches: one `(side, side)`, True where hidden, a kind.

    The blocks of a mask have one shape, of a random aspect ratio, and random places; they may overlap.
    """
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for blocks, share in _MASKS:
        mask = torch.ones(side, side, dtype=torch.bool)
        while mask.all():  # something must be left to predict from
            low, high = _ASPECT_RATIO
            aspect = low + (high - low) * torch.rand((), generator=generator).item()
            area = int(side * side * share)
            height, width = (min(side, max(1, round(math.sqrt(v)))) for v in (area * aspect, area / aspect))
            mask = torch.zeros(side, side, dtype=torch.bool)
            for _ in range(blocks):
                top, left = (
                    int(torch.randint(side - length + 1, (), generator=generator)) for length in (height, width)
                )
                mask[top : top + height, left : left + width] = True
        masks.append(mask)
    return masks

"""Faithfulness to a reference image: whether frames show what the image shows, in DINO's features."""

from __future__ import annotations

import torch
from torch import Tensor

from chopgrad_align import FrameReward, Frames, Samples, UsageError

from .image_features import DinoFeatures


class ReferenceImage(FrameReward):
    """Cosine similarity of the DINO features of each frame and of the image that the video was made from, in [-1, 1].

    VBench's image-to-video subject score (its `i2v_subject`) mixes the same similarity, of the frame that is nearest,
    with `subject_consistency`; here every frame counts, and the two are rewards of their own. Prompts are ignored.

    Args:
        checkpoint: Hub id or local folder of a transformers ViTModel.
        frames, frames_per_chunk: As for `FrameReward`.

    Raises:
        UsageError: The checkpoint does not exist or holds another model; a video without such an image.
    """

    def __init__(
        self, *, checkpoint: str = "facebook/dino-vitb16", frames: Frames = None, frames_per_chunk: int = 8
    ) -> None:
        super().__init__(frames=frames, frames_per_chunk=frames_per_chunk)
        self.features = DinoFeatures("reference_image", checkpoint)
        self.requires_grad_(False).eval()

    def score_frames(self, frames: Tensor, prompts: list[str], sample: Samples | None = None) -> Tensor:
        images = {} if sample is None else {id(image): image for image in sample.images}
        if sample is None or None in images.values():
            raise UsageError(
                "reference_image compares with the image that a video is made from, and there is none: give data whose "
                "rows have a column `image`"
            )
        with torch.no_grad():  # the image is given
            features = {key: self.features(image.unsqueeze(0))[0] for key, image in images.items() if image is not None}
        return (self.features(frames) * torch.stack([features[id(image)] for image in sample.images])).sum(-1)

"""Background consistency: whether the scene stays the same, in CLIP's features."""

from __future__ import annotations

from chopgrad_align import Frames

from .image_features import ClipFeatures, Consistency


class BackgroundConsistency(Consistency):
    """VBench's background consistency (Huang et al., arXiv 2311.17982), in [0, 1].

    The cosine similarity of each frame's CLIP embedding to that of the frame before and to that of the first one,
    negative ones as 0, averaged. A still video has 1: hold it against motion. Prompts are ignored.

    Args:
        checkpoint: Hub id or local folder of a transformers CLIPModel.
        frames: As for `SampledReward`; VBench reads all.

    Raises:
        UsageError: The checkpoint does not exist or holds another model; a video has one frame.
    """

    def __init__(self, *, checkpoint: str = "openai/clip-vit-base-patch32", frames: Frames = None) -> None:
        super().__init__("background_consistency", ClipFeatures("background_consistency", checkpoint), frames)

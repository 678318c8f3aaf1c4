"""Subject consistency: whether what is shown stays the same, in DINO's features."""

from __future__ import annotations

from chopgrad_align import Frames

from .image_features import Consistency, DinoFeatures


class SubjectConsistency(Consistency):
    """VBench's subject consistency (Huang et al., arXiv 2311.17982), in [0, 1].

    The cosine similarity of each frame's DINO feature to that of the frame before and to that of the first one,
    negative ones as 0, averaged. A still video has 1: hold it against motion. Prompts are ignored.

    Args:
        checkpoint: Hub id or local folder of a transformers ViTModel.
        frames: As for `SampledReward`; VBench reads all.

    Raises:
        UsageError: The checkpoint does not exist or holds another model; a video has one frame.
    """

    def __init__(self, *, checkpoint: str = "facebook/dino-vitb16", frames: Frames = None) -> None:
        super().__init__("subject_consistency", DinoFeatures("subject_consistency", checkpoint), frames)

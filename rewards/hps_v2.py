"""Human Preference Score v2: which of two images of a prompt would people choose."""

from __future__ import annotations

from torch import Tensor

from chopgrad_align import FrameReward, Frames, UsageError

from .checkpoints import loading, locate
from .clip_score import ImageTextSimilarity
from .preprocess import Resampling

_FILES = {"v2.1": "HPS_v2.1_compressed.pt", "v2.0": "HPS_v2_compressed.pt"}


class HPSv2(FrameReward):
    """Wu et al., "Human Preference Score v2" (arXiv 2306.09341): CLIP ViT-H/14, fine-tuned on human choices.

    The score is the cosine similarity of frame and prompt, unscaled as in the official `hpsv2.score`: in [-1, 1],
    in practice about 0.2 to 0.35. Preprocessing is the official one: the longest side to 224 (bicubic), black padding
    around the centre, OpenAI's mean and deviation. (Squashing frames to a square, as often done, gives other scores.)
    The official code resizes a tensor of floats, so that the overshoot of bicubic edges stays, beyond 0 and 1. With
    torchvision 0.17 and later it does so antialiased; with earlier ones, among them those of its publication, it
    skipped pixels.

    Args:
        version: `"v2.1"`, trained on better data, or `"v2.0"`, the default of the `hpsv2` package.
        checkpoint: Hub id or local folder with the official file (`HPS_v2.1_compressed.pt`, `HPS_v2_compressed.pt`), or
            that file: open_clip weights under the key `state_dict`, read with `weights_only=True`.
        model: The open_clip architecture of the weights.
        antialias: True for the scores that the official code gives today; False for those that it gave with torchvision
            before 0.17, on frames that are larger than 224 pixels.
        frames, frames_per_chunk: As for `FrameReward`.

    Raises:
        UsageError: There is no such version, or the checkpoint is missing, unreachable or of another model.
    """

    def __init__(
        self,
        *,
        version: str = "v2.1",
        checkpoint: str = "xswu/HPSv2@697403c78157020a1ae59d23f111aa58ced35b0a",
        model: str = "ViT-H-14",
        antialias: bool = True,
        frames: Frames = None,
        frames_per_chunk: int = 8,
    ) -> None:
        super().__init__(frames=frames, frames_per_chunk=frames_per_chunk)
        if version not in _FILES:
            raise UsageError(f"hps_v2: version={version!r}: expected {' or '.join(map(repr, _FILES))}")
        expected = f"hub id, folder or path of the official {_FILES[version]}, weights of open_clip's {model}"
        with loading(f"hps_v2: checkpoint={checkpoint!r}", expected):
            path = locate(checkpoint, _FILES[version])
            resampling: Resampling = "tensor" if antialias else "aliased"
            self.similarity = ImageTextSimilarity("hps_v2", model, str(path), "longest", resampling)
        self.requires_grad_(False).eval()

    def prepare_prompts(self, prompts: list[str]) -> None:
        self.similarity.texts(prompts)

    def score_frames(self, frames: Tensor, prompts: list[str]) -> Tensor:
        return self.similarity(frames, prompts)

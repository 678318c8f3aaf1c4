"""Terms of the objective: each answers for itself what it reads, how it scores a video and what the score is worth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..common.errors import UsageError
from .losses import Loss
from .losses.protocol import FrameLoss, VideoLoss, compare
from .losses.protocol import frames_read as frames_compared
from .losses.protocol import reads_sample as loss_reads_sample
from .reading import Reading
from .reward import Reward, check_reward
from .reward.frames import All
from .reward.protocol import FrameReward, frames_read, reads_audio, reads_sample, score
from .reward.reduction import Reduction
from .reward.samples import Samples
from .statistics import Statistics


@dataclass(frozen=True)
class Reference:
    """The reference that a prediction is compared with, and what else is known; each part is there if there is one.

    Attributes:
        target: The video that it should be, `(B, F, 3, H, W)` in [0, 1].
        mask: `(B, F, 1, H, W)`: 1 where something was to be made.
        latents: The predicted clean latents and the true ones, as the pipeline normalizes them.
        outputs: What the denoiser returned and what it should have returned.
        base_distance: Mean squared distance `(B,)` of the denoiser's predictions to those of the untrained model.
        sample: What the data say of each video; there if a term reads it.
    """

    target: Tensor | None = None
    mask: Tensor | None = None
    latents: tuple[Tensor, Tensor] | None = None
    outputs: tuple[Tensor, Tensor] | None = None
    base_distance: Tensor | None = None
    sample: Samples | None = None


class Term(ABC):
    """A part of the objective, which is the sum of the terms' values.

    A subclass of your own needs `score`; the rest are answers that it may give differently.

    Attributes:
        weight: Factor of the score; what it is worth has the sign of the objective, which rises.
        kind: `reward` if the score should rise, `loss` if it should fall; for messages and plots.
        normalize: Whether `value` wants the running statistics of the scores.
        reads_pixels: Whether the video has to be decoded for it.
        reads_latents: Whether it compares predicted latents with the true ones.
        reads_base: Whether it compares predictions with those of the model without what is trained, which is known in
            training alone.
        reads_sample: Whether it reads `Reference.sample`.
        reads_audio: Whether it reads the sound in there, of pipelines that make some.
        module: Network whose weights stay on the device, if there is one.
        frame_loss: Loss of single frames, all of them, that can be taken while the video is decoded, if it is one.
    """

    weight: float
    kind: ClassVar[Literal["reward", "loss"]] = "reward"
    normalize: bool = False
    reads_pixels: ClassVar[bool] = True
    reads_base: ClassVar[bool] = False

    @property
    def reads_latents(self) -> bool:
        """See the class."""
        return False

    @property
    def reads_sample(self) -> bool:
        """See the class."""
        return False

    @property
    def reads_audio(self) -> bool:
        """See the class."""
        return False

    @property
    def module(self) -> nn.Module | None:
        """See the class."""
        return None

    @property
    def frame_loss(self) -> FrameLoss | None:
        """See the class."""
        return None

    @property
    def reading(self) -> Reading:
        """The way people read its scores."""
        return Reading("higher" if self.kind == "reward" else "lower")

    def frames_read(self, total: int, seeds: Sequence[int]) -> list[list[int]]:
        """The frames of each sample that it reads, of videos of `total` frames; default: all."""
        return [list(range(total)) for _ in seeds]

    @abstractmethod
    def score(self, video: Tensor, prompts: list[str], seeds: Sequence[int], reference: Reference) -> Tensor:
        """Differentiable scores `(B,)` in the term's own unit; see `Objective.scores`."""

    def value(self, score: Tensor, statistics: Statistics | None = None) -> Tensor:
        """The contribution of scores `(B,)` to the objective, in float32 or more; a normalized term has statistics."""
        sign = 1 if self.kind == "reward" else -1
        return sign * self.weight * score.to(torch.promote_types(score.dtype, torch.float32))

    def check(
        self,
        name: str,
        prompts: list[str],
        frames: int,
        size: tuple[int, int],
        device: torch.device,
        sample: Samples | None = None,
    ) -> None:
        """Raise a UsageError if it breaks its contract on a small video; default: nothing is tried."""
        return


@dataclass(frozen=True)
class RewardTerm(Term):
    """A reward, and how much of it is wanted.

    Args:
        reward: Scores videos.
        weight: A negative one lowers the reward's score.
        cap: In the reward's own unit. A score beyond it, in the direction in which the weight pushes, counts as `cap`
            and has no gradient: `min(r, cap)` for a positive weight, `max(r, cap)` for a negative one.
        target: In the reward's own unit. The score is replaced by `-|r - target|`.
        normalize: Divide by the running standard deviation of the reward's scores, so that weights compare rewards of
            different units; without a target, their running mean is subtracted too.
        reduce: How scores of frames become that of a video; None is the mean.

    Raises:
        UsageError: Both a cap and a target.
    """

    reward: Reward
    weight: float = 1.0
    cap: float | None = None
    target: float | None = None
    normalize: bool = False
    reduce: Reduction | None = None

    def __post_init__(self) -> None:
        if self.cap is not None and self.target is not None:
            raise UsageError("a term has a cap or a target, not both")

    @property
    def reads_sample(self) -> bool:
        """True if the reward asks for it."""
        return reads_sample(self.reward)

    @property
    def reads_audio(self) -> bool:
        """True if the reward asks for it."""
        return reads_audio(self.reward)

    @property
    def module(self) -> nn.Module | None:
        """The reward, if it is a network."""
        return self.reward if isinstance(self.reward, nn.Module) else None

    @property
    def reading(self) -> Reading:
        """The reward's own scores; no direction is better if they have a target."""
        return Reading("" if self.target is not None else "higher" if self.weight >= 0 else "lower")

    def frames_read(self, total: int, seeds: Sequence[int]) -> list[list[int]]:
        """See `Term.frames_read`."""
        return frames_read(self.reward, total, seeds)

    def score(self, video: Tensor, prompts: list[str], seeds: Sequence[int], reference: Reference) -> Tensor:
        """The reward's scores `(B,)`."""
        return score(self.reward, video, prompts, seeds, reference.sample, self.reduce)

    def value(self, score: Tensor, statistics: Statistics | None = None) -> Tensor:
        """See `Term.value`: of the score with its cap, target and normalization."""
        value = score.to(torch.promote_types(score.dtype, torch.float32))
        if self.target is not None:
            value = -(value - self.target).abs()
        elif self.cap is not None:
            value = value.clamp(max=self.cap) if self.weight >= 0 else value.clamp(min=self.cap)
        if self.normalize:
            if statistics is None:
                raise ValueError("a normalized term needs statistics")
            value = (value if self.target is not None else value - statistics.mean) / statistics.std
        return self.weight * value

    def check(
        self,
        name: str,
        prompts: list[str],
        frames: int,
        size: tuple[int, int],
        device: torch.device,
        sample: Samples | None = None,
    ) -> None:
        """Score a small video and take the gradient; frames that are scored alone need no more than a few."""
        frames = min(frames, 5) if isinstance(self.reward, FrameReward) and not self.reads_sample else frames
        options: dict[str, Any] = {"size": size, "device": device, "sample": sample, "reduce": self.reduce}
        check_reward(self.reward, name, prompts=prompts, frames=frames, **options)


@dataclass(frozen=True)
class LossTerm(Term):
    """A pixel loss against the target; it should fall.

    Args:
        loss: Compares videos.
        weight: Positive.
    """

    loss: Loss
    weight: float = 1.0
    kind = "loss"

    @property
    def reads_sample(self) -> bool:
        """True if the loss asks for it."""
        return loss_reads_sample(self.loss)

    @property
    def module(self) -> nn.Module | None:
        """The loss, if it is a network."""
        return self.loss if isinstance(self.loss, nn.Module) else None

    @property
    def frame_loss(self) -> FrameLoss | None:
        """The loss, if it compares every frame alone, by nothing but pixels."""
        if isinstance(self.loss, FrameLoss) and isinstance(self.loss.frames, All) and not self.reads_sample:
            return self.loss
        return None

    @property
    def reading(self) -> Reading:
        """The loss's own."""
        return self.loss.reading if isinstance(self.loss, FrameLoss | VideoLoss) else super().reading

    def frames_read(self, total: int, seeds: Sequence[int]) -> list[list[int]]:
        """See `Term.frames_read`."""
        return frames_compared(self.loss, total, seeds)

    def score(self, video: Tensor, prompts: list[str], seeds: Sequence[int], reference: Reference) -> Tensor:
        """The loss `(B,)`."""
        if reference.target is None:
            raise UsageError("a pixel loss needs data with a target: give a section data.clips")
        return compare(self.loss, video, reference.target, reference.mask, seeds, reference.sample)


@dataclass(frozen=True)
class LatentTerm(Term):
    """Mean squared error before the decoder; it should fall.

    Args:
        of: `latents`, of the predicted clean latents; `outputs`, of the denoiser's output, the usual diffusion loss.
        weight: Positive.
    """

    of: Literal["latents", "outputs"]
    weight: float = 1.0
    kind = "loss"
    reads_pixels = False

    @property
    def reads_latents(self) -> bool:
        """True if it compares latents."""
        return self.of == "latents"

    def frames_read(self, total: int, seeds: Sequence[int]) -> list[list[int]]:
        """None of the frames."""
        return [[] for _ in seeds]

    def score(self, video: Tensor, prompts: list[str], seeds: Sequence[int], reference: Reference) -> Tensor:
        """The error `(B,)`, in float32."""
        pair = getattr(reference, self.of)
        if pair is None:
            modes = {"latents": "one_step or denoise", "outputs": "denoise"}[self.of]
            raise UsageError(f"a loss of {self.of} needs prediction.mode={modes}")
        predicted, true = pair
        return (predicted.float() - true.float()).square().flatten(1).mean(1)


@dataclass(frozen=True)
class BaseDistanceTerm(Term):
    """Mean squared distance of the denoiser's predictions to those of the untrained model; it should fall.

    A step of a stochastic sampler is a Gaussian policy whose mean is linear in the prediction: the distance is its KL
    divergence to the untrained policy but for a factor, `KL = c²/(2σ²) ‖ε_θ(x) - ε_0(x)‖²` with the prediction's
    coefficient c in the mean and the standard deviation σ (DPOK, arXiv 2305.16381, equation 8).

    Args:
        weight: Positive.
    """

    weight: float = 1.0
    kind = "loss"
    reads_pixels = False
    reads_base = True

    def frames_read(self, total: int, seeds: Sequence[int]) -> list[list[int]]:
        """None of the frames."""
        return [[] for _ in seeds]

    def score(self, video: Tensor, prompts: list[str], seeds: Sequence[int], reference: Reference) -> Tensor:
        """The distance `(B,)`."""
        if reference.base_distance is None:
            raise UsageError("the distance to the untrained model is known in training only")
        return reference.base_distance

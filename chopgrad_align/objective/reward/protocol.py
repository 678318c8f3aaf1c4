"""The protocol of rewards, and the bases that read chosen frames, in chunks where frames are scored alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...common.arguments import whole_number
from ...common.errors import UsageError
from .frames import Frames, Random, frame_sampler
from .reduction import Reduction, reduced
from .samples import Samples, declares_sample


class Reward(Protocol):
    """A differentiable score for each video, higher is better; never a loss: sign and weight are applied outside.

    One that has a further argument `sample: Samples | None = None` is given what else is known of the samples.
    """

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        """Score `video` `(B, F, 3, H, W)` in [0, 1], sample b against `prompts[b]`; returns `(B,)`.

        Or `(B, F)`, a score a frame, which is reduced to a video's outside; see `chopgrad_align.Reduction`.
        """
        ...


class SampledReward(nn.Module, ABC):
    """A reward that reads chosen frames of a video, and says which, so that the others need not be decoded.

    If its `score_video` has a further argument `sample: Samples | None = None`, it is given what else is known of the
    samples; videos there that are as long as the one that is scored have the chosen frames too.

    Args:
        frames: Which; see `frame_sampler`. A number is that many evenly spaced frames, None all.

    Raises:
        UsageError: `frames` is not a choice of frames, or a call's shapes do not fit together.
    """

    exact_gradient: bool = True
    """False for a gradient that is an approximation by design, as through rounding."""

    def __init__(self, *, frames: Frames = None) -> None:
        super().__init__()
        try:
            self.frames = frame_sampler(frames)
        except UsageError as error:
            raise UsageError(f"{type(self).__name__}: {error}") from None

    reads_audio: bool = False
    """True to be given the sound, in `Samples.audio`, of pipelines that make some; it is made with a gradient then."""

    @property
    def reads_sample(self) -> bool:
        """True if it is given what else is known of the samples."""
        return declares_sample(self.score_video)

    @abstractmethod
    def score_video(self, video: Tensor, prompts: list[str]) -> Tensor:
        """Score `video` `(B, n, 3, H, W)` in [0, 1], the n frames that were chosen; returns `(B,)` or, a score a frame,
        `(B, n)`."""

    def forward(
        self,
        video: Tensor,
        prompts: list[str],
        seeds: Sequence[int] | None = None,
        sample: Samples | None = None,
        reduce: Reduction | None = None,
    ) -> Tensor:
        """Score the chosen frames of `video` `(B, F, 3, H, W)` in [0, 1]; `(B,)`.

        Args:
            video: On the device of the weights.
            prompts: One a sample.
            seeds: One a sample; they decide what random choices are. None draws them from torch's global generator.
            sample: What else is known.
            reduce: How scores of frames become one; None is the mean.
        """
        name = type(self).__name__
        if video.ndim != 5 or video.shape[2] != 3 or isinstance(prompts, str) or len(prompts) != len(video):
            given = repr(prompts) if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise UsageError(
                f"{name}: expected a video (B, F, 3, H, W) and a list of B prompts, "
                f"got {tuple(video.shape)} and {given}"
            )
        if seeds is None:
            drawn = isinstance(self.frames, Random)
            seeds = torch.randint(2**62, (len(video),)).tolist() if drawn else [0] * len(video)
        self.prepare_prompts(prompts)
        total = video.shape[1]
        chosen = [self.frames.indices(total, seed) for seed in seeds]
        if len(chosen[0]) < total:
            samples = torch.arange(len(video), device=video.device)[:, None]
            video = video[samples, torch.tensor(chosen, device=video.device)]
            sample = None if sample is None else sample.choose_frames(chosen, total)
        scores = reduced(self._score_video(video, prompts, sample), video.shape[1], reduce)
        return check_scores(f"{name}.score_video", scores, len(video))

    def _score_video(self, video: Tensor, prompts: list[str], sample: Samples | None) -> Tensor:
        score_video: Any = self.score_video
        return score_video(video, prompts, **({"sample": sample} if declares_sample(score_video) else {}))

    def prepare_prompts(self, prompts: list[str]) -> None:
        """See all prompts of a call, before its frames come in chunks; to encode them at once, for example."""

    def at_fps(self, fps: float) -> SampledReward:
        """This reward for videos of `fps` frames a second: itself, unless it depends on that and was not told."""
        return self

    def score_chosen(self, frames: Iterable[Tensor], prompt: str, sample: Samples | None = None) -> Tensor:
        """Score one video by the frames that were chosen of it, `(3, H, W)` each, as they come; `(1,)` or `(1, n)`."""
        return self._score_video(torch.stack(list(frames)).unsqueeze(0), [prompt], sample)


class FrameReward(SampledReward):
    """A reward that scores every frame alone; a video's score is the mean over its chosen frames, if nothing else is
    asked for.

    If its `score_frames` has a further argument `sample: Samples | None = None`, it is given what else is known: each
    frame is a sample there, and videos as long as the one that is scored are the frame at hand, `(1, C, H, W)`.

    Args:
        frames: Which; see `frame_sampler`. A number is that many evenly spaced frames, None all.
        frames_per_chunk: How many frames are scored at a time. When there are more, each chunk runs again in the
            backward pass, so that the activations of one chunk are alive at any moment.

    Raises:
        UsageError: As `SampledReward`; `frames_per_chunk` is not a positive whole number.
    """

    def __init__(self, *, frames: Frames = None, frames_per_chunk: int = 8) -> None:
        super().__init__(frames=frames)
        self.frames_per_chunk = whole_number(f"{type(self).__name__}: frames_per_chunk", frames_per_chunk)

    @property
    def reads_sample(self) -> bool:
        """See `SampledReward`."""
        return declares_sample(self.score_frames)

    @abstractmethod
    def score_frames(self, frames: Tensor, prompts: list[str]) -> Tensor:
        """Score `frames` `(N, 3, H, W)` in [0, 1], frame n against `prompts[n]`; returns `(N,)`."""

    def score_video(self, video: Tensor, prompts: list[str], sample: Samples | None = None) -> Tensor:
        """Score of each frame of `video` `(B, n, 3, H, W)` in [0, 1]; `(B, n)`, at least float32."""
        frames = video.flatten(0, 1)
        count = video.shape[1]
        prompts_of_frames = [prompt for prompt in prompts for _ in range(count)]
        of_frames = None if sample is None else sample.as_frames(count)
        # One chunk alone gains nothing from running twice: its activations are the peak either way.
        recompute = len(frames) > self.frames_per_chunk and frames.requires_grad and torch.is_grad_enabled()

        scores = []
        # Not slices: the gradient of each would be as large as all frames.
        for index, chunk in enumerate(frames.split(self.frames_per_chunk)):
            part = range(index * self.frames_per_chunk, index * self.frames_per_chunk + len(chunk))
            rest = [prompts_of_frames[i] for i in part], None if of_frames is None else of_frames.take(part)
            scores.append(
                checkpoint(self._score_chunk, chunk, *rest, use_reentrant=False)
                if recompute
                else self._score_chunk(chunk, *rest)
            )
        return torch.cat(scores).view(len(video), count)

    def score_chosen(self, frames: Iterable[Tensor], prompt: str, sample: Samples | None = None) -> Tensor:
        """See `SampledReward.score_chosen`; holds one chunk of frames at a time."""
        if self.reads_sample:
            return super().score_chosen(frames, prompt, sample)
        frames, scores = iter(frames), []
        while chunk := list(islice(frames, self.frames_per_chunk)):
            scores.append(self._score_chunk(torch.stack(chunk), [prompt] * len(chunk), None))
        return torch.cat(scores).unsqueeze(0)

    def _score_chunk(self, frames: Tensor, prompts: list[str], sample: Samples | None) -> Tensor:
        """Scores `(N,)` in float32 at least."""
        score_frames: Any = self.score_frames
        scores = score_frames(frames, prompts, **({"sample": sample} if self.reads_sample else {}))
        scores = check_scores(f"{type(self).__name__}.score_frames", scores, len(frames))
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


def at_fps(reward: Reward, fps: float) -> Reward:
    """The reward for videos of `fps` frames a second; one that does not say that it depends on them stays as it is."""
    return reward.at_fps(fps) if isinstance(reward, SampledReward) else reward


def reads_sample(reward: Reward) -> bool:
    """True if a reward is given what else is known of the samples.

    Raises:
        UsageError: Its argument `sample` is of another kind.
    """
    if isinstance(reward, SampledReward):
        return reward.reads_sample
    return declares_sample(reward.forward if isinstance(reward, nn.Module) else reward)


def reads_audio(reward: Reward) -> bool:
    """True if a reward reads the sound of its samples."""
    return isinstance(reward, SampledReward) and reward.reads_audio


def score_chosen(
    reward: Reward,
    frames: Iterable[Tensor],
    prompt: str,
    sample: Samples | None = None,
    reduce: Reduction | None = None,
) -> Tensor:
    """Score one video by those frames that `frames_read` names, `(3, H, W)` each, as they come; `(1,)`.

    `sample` has the same frames of videos that are as long as the file; `reduce` is as for `score`.
    """
    if isinstance(reward, SampledReward):
        scores = reward.score_chosen(frames, prompt, sample)
        return reduced(scores, scores.shape[1] if scores.ndim == 2 else 1, reduce)
    return score(reward, torch.stack(list(frames)).unsqueeze(0), [prompt], [0], sample, reduce)


def score(
    reward: Reward,
    video: Tensor,
    prompts: list[str],
    seeds: Sequence[int],
    sample: Samples | None = None,
    reduce: Reduction | None = None,
) -> Tensor:
    """Score videos: `reward(video, prompts)`, with all that it asks for; `(B,)`.

    Args:
        reward: Anything that can be called so.
        video: `(B, F, 3, H, W)` in [0, 1].
        prompts: One a sample.
        seeds: One a sample; they decide random choices of frames.
        sample: What else is known, for rewards that read it.
        reduce: How scores of frames become one; None is the mean.

    Raises:
        UsageError: `reduce` of a reward whose scores are of videos.
    """
    told = {"sample": sample} if reads_sample(reward) else {}
    call: Any = reward
    if isinstance(reward, SampledReward):
        return call(video, prompts, seeds, **told, **({} if reduce is None else {"reduce": reduce}))
    return reduced(call(video, prompts, **told), video.shape[1], reduce)


def frames_read(reward: Reward, total: int, seeds: Sequence[int]) -> list[list[int]]:
    """Which frames of each sample a reward reads, of videos of `total` frames; all unless it says so."""
    if isinstance(reward, SampledReward):
        return [reward.frames.indices(total, seed) for seed in seeds]
    return [list(range(total)) for _ in seeds]


def check_scores(name: str, scores: object, batch: int) -> Tensor:
    """Return `scores` if they are a floating-point tensor `(batch,)`; cheap enough for every step.

    Raises:
        UsageError: They are not. Finiteness is not looked at: that would wait for the device.
    """
    if not isinstance(scores, Tensor):
        raise UsageError(f"{name} returned a {type(scores).__name__} ({scores!r:.60}), expected a tensor ({batch},)")
    if not scores.is_floating_point():
        raise UsageError(f"{name} returned {scores.dtype} scores, expected floating point")
    if scores.shape != (batch,):
        raise UsageError(
            f"{name} returned scores of shape {tuple(scores.shape)} for a batch of {batch}, expected ({batch},): "
            "one score a sample"
        )
    return scores

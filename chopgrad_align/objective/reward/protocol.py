"""The protocol of rewards, and the bases that read chosen frames, in chunks where frames are scored alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...common.arguments import whole_number
from ...common.errors import UsageError
from .frames import Frames, Random, frame_sampler


class Reward(Protocol):
    """A differentiable score for each video, higher is better; never a loss: sign and weight are applied outside."""

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        """Score `video` `(B, F, 3, H, W)` in [0, 1], sample b against `prompts[b]`; returns `(B,)`."""
        ...


class SampledReward(nn.Module, ABC):
    """A reward that reads chosen frames of a video, and says which, so that the others need not be decoded.

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

    @abstractmethod
    def score_video(self, video: Tensor, prompts: list[str]) -> Tensor:
        """Score `video` `(B, n, 3, H, W)` in [0, 1], the n frames that were chosen; returns `(B,)`."""

    def forward(self, video: Tensor, prompts: list[str], seeds: Sequence[int] | None = None) -> Tensor:
        """Score the chosen frames of `video` `(B, F, 3, H, W)` in [0, 1]; `(B,)`.

        `seeds`, one a sample, decide what random choices are; None draws them from torch's global generator.
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
        return check_scores(f"{name}.score_video", self.score_video(video, prompts), len(video))

    def prepare_prompts(self, prompts: list[str]) -> None:
        """See all prompts of a call, before its frames come in chunks; to encode them at once, for example."""

    def at_fps(self, fps: float) -> SampledReward:
        """This reward for videos of `fps` frames a second: itself, unless it depends on that and was not told."""
        return self

    def score_chosen(self, frames: Iterable[Tensor], prompt: str) -> Tensor:
        """Score one video by the frames that were chosen of it, `(3, H, W)` each, as they come; `(1,)`."""
        return self.score_video(torch.stack(list(frames)).unsqueeze(0), [prompt])


class FrameReward(SampledReward):
    """A reward that scores every frame alone; a video's score is the mean over its chosen frames.

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

    @abstractmethod
    def score_frames(self, frames: Tensor, prompts: list[str]) -> Tensor:
        """Score `frames` `(N, 3, H, W)` in [0, 1], frame n against `prompts[n]`; returns `(N,)`."""

    def score_video(self, video: Tensor, prompts: list[str]) -> Tensor:
        """Mean score over the frames of `video` `(B, n, 3, H, W)` in [0, 1]; `(B,)`, at least float32."""
        frames = video.flatten(0, 1)
        prompts_of_frames = [prompt for prompt in prompts for _ in range(video.shape[1])]
        # One chunk alone gains nothing from running twice: its activations are the peak either way.
        recompute = len(frames) > self.frames_per_chunk and frames.requires_grad and torch.is_grad_enabled()

        scores = []
        # Not slices: the gradient of each would be as large as all frames.
        for index, chunk in enumerate(frames.split(self.frames_per_chunk)):
            start = index * self.frames_per_chunk
            texts = prompts_of_frames[start : start + len(chunk)]
            score = (
                checkpoint(self.score_frames, chunk, texts, use_reentrant=False)
                if recompute
                else self.score_frames(chunk, texts)
            )
            scores.append(check_scores(f"{type(self).__name__}.score_frames", score, len(chunk)))
        all_scores = torch.cat(scores)
        all_scores = all_scores.to(torch.promote_types(all_scores.dtype, torch.float32))
        return all_scores.view(len(video), -1).mean(1)

    def score_chosen(self, frames: Iterable[Tensor], prompt: str) -> Tensor:
        """See `SampledReward.score_chosen`; holds one chunk of frames at a time."""
        frames, scores = iter(frames), []
        while chunk := list(islice(frames, self.frames_per_chunk)):
            scores.append(self.score_frames(torch.stack(chunk), [prompt] * len(chunk)))
        all_scores = torch.cat(scores)
        return all_scores.to(torch.promote_types(all_scores.dtype, torch.float32)).mean(0, keepdim=True)


def at_fps(reward: Reward, fps: float) -> Reward:
    """The reward for videos of `fps` frames a second; one that does not say that it depends on them stays as it is."""
    return reward.at_fps(fps) if isinstance(reward, SampledReward) else reward


def score_chosen(reward: Reward, frames: Iterable[Tensor], prompt: str) -> Tensor:
    """Score one video by those frames that `frames_read` names, `(3, H, W)` each, as they come; `(1,)`."""
    if isinstance(reward, SampledReward):
        return reward.score_chosen(frames, prompt)
    return reward(torch.stack(list(frames)).unsqueeze(0), [prompt])


def score(reward: Reward, video: Tensor, prompts: list[str], seeds: Sequence[int]) -> Tensor:
    """`reward(video, prompts)`, with random choices of frames decided by one seed a sample."""
    if isinstance(reward, SampledReward):
        return reward(video, prompts, seeds)
    return reward(video, prompts)


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

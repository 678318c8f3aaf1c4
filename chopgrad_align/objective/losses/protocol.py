"""The protocol of losses, and the bases of those that compare frames alone and neighbouring frames.

Where a mask weighs a loss, two rules hold for all of them:

- The error of a position counts with its weight `w`, `inside` where the mask is 1 and `outside` where it is 0, in a
  plain mean: `mean(w e)`. So weights add up, and a small region has a small loss.
- Where the weight is 0, the loss is shown the target's pixel in place of the video's. So what lies there has neither
  error nor gradient, also where the error of a position comes from its surroundings, as with SSIM or LPIPS. A loss
  without a map of the error, which nothing else could weigh, can thus still leave a region out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...common.arguments import whole_number
from ...common.errors import UsageError
from ..reading import Reading
from ..reward.frames import Frames, Random, frame_sampler
from ..reward.samples import Samples, declares_sample


class Loss(Protocol):
    """How far a video is from a target, 0 or more; lower is better. Sign and weight are applied once, outside.

    One that has a further argument `sample: Samples | None = None` is given what else is known of the samples; so is
    a `FrameLoss` whose method `error` has it.
    """

    def __call__(self, video: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compare `video` with `target`, both `(B, F, 3, H, W)` in [0, 1]; returns `(B,)`.

        `mask` `(B, F, 1, H, W)` in {0, 1} says what lies inside the region, for losses that weigh regions.
        """
        ...


class _RegionLoss(nn.Module, ABC):
    """A loss with a weight for what lies inside and outside a mask."""

    has_map: ClassVar[bool] = True
    """True if errors have a place; if not, a mask can leave a region out but not weigh it."""

    reading: ClassVar[Reading] = Reading("lower")
    """The way people read its errors."""

    def __init__(self, inside: float, outside: float) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, weight in (("inside", inside), ("outside", outside)):
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                raise UsageError(f"{name}: {argument}={weight!r}: expected a number, 0 or more")
        if inside == outside == 0:
            raise UsageError(f"{name}: inside=0 and outside=0 leave nothing to compare")
        if not self.has_map and inside != outside and 0 not in (inside, outside):
            raise UsageError(
                f"{name}: inside={inside}, outside={outside}: it compares frames as a whole, so a mask can leave a "
                "region out (a weight of 0) but not weigh it"
            )
        self.inside, self.outside = float(inside), float(outside)

    def _checked_mask(self, video: Tensor, target: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask if there is something to weigh.

        Raises:
            UsageError: Shapes do not fit together, or there is no mask.
        """
        name = type(self).__name__
        if video.ndim != 5 or video.shape[2] != 3 or target.shape != video.shape:
            raise UsageError(
                f"{name}: expected a video and a target (B, F, 3, H, W) of the same shape, "
                f"got {tuple(video.shape)} and {tuple(target.shape)}"
            )
        if mask is None and self.inside != self.outside:
            raise UsageError(
                f"{name}: inside={self.inside:g} and outside={self.outside:g} weigh a mask, but there is none: "
                "give data with masks, or leave the weights out"
            )
        if mask is None:
            return None
        expected = (*video.shape[:2], 1, *video.shape[3:])
        if mask.shape != expected:
            raise UsageError(f"{name}: expected a mask {expected} for this video, got {tuple(mask.shape)}")
        return None if self.inside == self.outside else mask

    def _weights(self, mask: Tensor | None, frames: Tensor) -> Tensor:
        """`(N, 1, H, W)`; without a mask `(1, 1, 1, 1)`."""
        if mask is None:
            return frames.new_full((1, 1, 1, 1), self.inside)
        return self.outside + (self.inside - self.outside) * mask.to(frames.dtype)

    def _weighed(self, errors: Tensor | Sequence[Tensor], weights: Tensor) -> Tensor:
        """Mean over each map of the weighed error `(N, h, w)`, summed over the maps; `(N,)`."""
        errors = [errors] if isinstance(errors, Tensor) else errors
        for error in errors:
            if error.ndim != (3 if self.has_map else 1):
                expected = "a map (N, h, w); a loss without one says has_map = False" if self.has_map else "(N,)"
                raise UsageError(
                    f"{type(self).__name__}.error returned shape {tuple(error.shape)}, expected {expected}"
                )
        if self.has_map:
            means = [(error * _resized(weights, error.shape[-2:])).mean((1, 2)) for error in errors]
        else:
            means = [error * max(self.inside, self.outside) for error in errors]  # the other weight left its region out
        return torch.stack(means).sum(0)


class FrameLoss(_RegionLoss):
    """A loss that compares every frame alone; a video's loss is the mean over its chosen frames.

    So the losses of parts of a video, each times its share of the frames, add up to that of the whole.

    Args:
        frames: Which are compared, as `chopgrad_align.objective.reward.frame_sampler` takes them.
        frames_per_chunk: How many frames are compared at a time. When there are more, each chunk runs again in the
            backward pass, so that the activations of one chunk are alive at any moment.
        inside: Weight of errors where the mask is 1.
        outside: Weight of errors where the mask is 0.

    Raises:
        UsageError: An argument is out of range, the shapes of a call do not fit together, or `inside` and `outside`
            differ and there is no mask.
    """

    def __init__(
        self, *, frames: Frames = "all", frames_per_chunk: int = 8, inside: float = 1.0, outside: float = 1.0
    ) -> None:
        super().__init__(inside, outside)
        name = type(self).__name__
        try:
            self.frames = frame_sampler(frames)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        self.frames_per_chunk = whole_number(f"{name}: frames_per_chunk", frames_per_chunk)

    @property
    def reads_sample(self) -> bool:
        """True if it is given what else is known of the samples; each frame is a sample then."""
        return declares_sample(self.error)

    @abstractmethod
    def error(self, frames: Tensor, target: Tensor) -> Tensor | Sequence[Tensor]:
        """Compare `frames` with `target`, both `(N, 3, H, W)` in [0, 1], at least float32.

        Returns:
            A map of the error `(N, h, w)` of any size, or several, whose means are added; `(N,)` if `has_map` is False.
        """

    def forward(
        self,
        video: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        seeds: Sequence[int] | None = None,
        sample: Samples | None = None,
    ) -> Tensor:
        """Compare the chosen frames of `video` and `target` `(B, F, 3, H, W)` in [0, 1]; `(B,)`, at least float32.

        `mask` is `(B, F, 1, H, W)` in {0, 1}. `seeds`, one a sample, decide what random choices of frames are; None
        draws them from torch's global generator.
        """
        mask = self._checked_mask(video, target, mask)
        batch, total = video.shape[:2]
        if isinstance(self.frames, Random) and seeds is None:
            seeds = torch.randint(2**62, (batch,)).tolist()
        chosen = frames_read(self, total, seeds or [0] * batch)
        if len(chosen[0]) < total:
            pick = torch.arange(batch, device=video.device)[:, None], torch.tensor(chosen, device=video.device)
            video, target, mask = video[pick], target[pick], None if mask is None else mask[pick]
            sample = None if sample is None else sample.choose_frames(chosen, total)
        frames, references = video.flatten(0, 1), target.detach().flatten(0, 1)
        masks = None if mask is None else mask.flatten(0, 1)
        of_frames = None if sample is None else sample.as_frames(video.shape[1])

        # One chunk alone gains nothing from running twice. Chunks are split, not sliced: the gradient of each slice
        # would be as large as all frames.
        recompute = len(frames) > self.frames_per_chunk and frames.requires_grad and torch.is_grad_enabled()
        losses, start = [], 0
        for chunk in frames.split(self.frames_per_chunk):
            part = slice(start, start + len(chunk))
            told = None if of_frames is None else of_frames.take(range(part.start, part.stop))
            rest = references[part], None if masks is None else masks[part], told
            loss = (
                checkpoint(self._losses, chunk, *rest, use_reentrant=False) if recompute else self._losses(chunk, *rest)
            )
            losses.append(loss)
            start = part.stop
        return torch.cat(losses).view(batch, -1).mean(1)

    def _losses(self, frames: Tensor, target: Tensor, mask: Tensor | None, sample: Samples | None) -> Tensor:
        """A loss for each frame, `(N,)`."""
        frames, target = _wide(frames), _wide(target)
        weights = self._weights(mask, frames)
        error: Any = self.error
        told = {"sample": sample} if self.reads_sample else {}
        return self._weighed(error(_shown(frames, target, weights), target, **told), weights)


class VideoLoss(_RegionLoss):
    """A loss that compares neighbouring frames with what the target says of them; the mean over a video's pairs.

    A position of a pair has the larger of the weights that it has in the two frames.

    Args:
        pairs_per_chunk: How many pairs are compared at a time. Each chunk runs again in the backward pass, so that the
            activations of one chunk are alive at any moment.
        inside, outside: As for `FrameLoss`.

    Raises:
        UsageError: As for `FrameLoss`; or a video has one frame.
    """

    def __init__(self, *, pairs_per_chunk: int = 8, inside: float = 1.0, outside: float = 1.0) -> None:
        super().__init__(inside, outside)
        self.pairs_per_chunk = whole_number(f"{type(self).__name__}: pairs_per_chunk", pairs_per_chunk)

    @abstractmethod
    def guide(self, target: Tensor) -> Tensor:
        """Guidance `(N, ...)` of the N pairs of neighbours from `target` `(N + 1, 3, H, W)` in [0, 1].

        Computed once, without gradient, and kept for the backward pass.
        """

    @abstractmethod
    def error(self, frames: Tensor, guide: Tensor) -> Tensor:
        """Error `(N, h, w)` of the N pairs of neighbours of `frames` `(N + 1, 3, H, W)` in [0, 1]."""

    def forward(self, video: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compare `video` and `target` `(B, F, 3, H, W)` in [0, 1], with a mask `(B, F, 1, H, W)`; `(B,)`."""
        mask = self._checked_mask(video, target, mask)
        if video.shape[1] < 2:
            raise UsageError(f"{type(self).__name__}: expected a video of 2 frames or more, got 1")
        masks = [None] * len(video) if mask is None else mask
        return torch.stack([self._sample(*sample) for sample in zip(video, target.detach(), masks, strict=True)])

    def _sample(self, video: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        """The loss of one video."""
        # Split, not sliced, as in `FrameLoss`; a chunk's last pair ends in the next chunk's first frame.
        chunks = video.split(self.pairs_per_chunk)
        losses, start = [], 0
        for chunk, after in zip(chunks, [*(following[:1] for following in chunks[1:]), chunks[-1][:0]], strict=True):
            part = slice(start, start + len(chunk) + len(after))
            if len(chunk) + len(after) > 1:
                with torch.no_grad():  # the target is given
                    guide = self.guide(_wide(target[part]))
                rest = chunk, after, target[part], None if mask is None else mask[part], guide
                losses.append(checkpoint(self._losses, *rest, use_reentrant=False))
            start += len(chunk)
        return torch.cat(losses).mean()

    def _losses(self, chunk: Tensor, after: Tensor, target: Tensor, mask: Tensor | None, guide: Tensor) -> Tensor:
        """A loss for each pair, `(N,)`."""
        frames = _wide(torch.cat([chunk, after]))
        weights = self._weights(mask, frames)
        errors = self.error(_shown(frames, _wide(target), weights), guide)
        return self._weighed(errors, weights if mask is None else torch.maximum(weights[:-1], weights[1:]))


def reads_sample(loss: Loss) -> bool:
    """True if a loss is given what else is known of the samples.

    Raises:
        UsageError: Its argument `sample` is of another kind.
    """
    if isinstance(loss, FrameLoss):
        return loss.reads_sample
    return declares_sample(loss.forward if isinstance(loss, nn.Module) else loss)


def compare(
    loss: Loss,
    video: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    sample: Samples | None = None,
) -> Tensor:
    """`loss(video, target, mask)`, with random choices of frames decided by one seed a sample.

    `sample` is what else is known, for losses that read it.
    """
    call: Any = loss
    told = {"sample": sample} if reads_sample(loss) else {}
    if isinstance(loss, FrameLoss):
        return call(video, target, mask, seeds, **told)
    return call(video, target, mask, **told)


def frames_read(loss: Loss, total: int, seeds: Sequence[int]) -> list[list[int]]:
    """Which frames of each sample a loss reads, of videos of `total` frames; all unless it says so."""
    if isinstance(loss, FrameLoss):
        return [loss.frames.indices(total, seed) for seed in seeds]
    return [list(range(total)) for _ in seeds]


def expect_size(name: str, frames: Tensor, smallest: int) -> None:
    """Check that the sides of `frames` `(N, 3, H, W)` have `smallest` pixels or more.

    Raises:
        UsageError: They have not.
    """
    if min(frames.shape[-2:]) < smallest:
        height, width = frames.shape[-2:]
        raise UsageError(f"{name}: expected frames of {smallest}x{smallest} pixels or more, got {height}x{width}")


def _wide(frames: Tensor) -> Tensor:
    """At least float32: half precision would round small errors away."""
    return frames.to(torch.promote_types(frames.dtype, torch.float32))


def _shown(frames: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """`frames`, and `target` where the weight is 0; all `(N, _, H, W)`."""
    return frames if weights.numel() == 1 else torch.where(weights == 0, target, frames)


def _resized(weights: Tensor, size: Sequence[int]) -> Tensor:
    """`(N, 1, H, W)` -> `(N, h, w)`, each the mean over what it covers; what is one number stays so."""
    if weights.numel() > 1 and weights.shape[-2:] != size:
        weights = F.interpolate(weights, size=tuple(size), mode="area")
    return weights[:, 0]

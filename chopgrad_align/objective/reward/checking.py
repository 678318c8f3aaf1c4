"""Find a broken reward before long work: its scores and its gradient on one small video."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...common.errors import UsageError
from ...common.loading import failing_as_usage_error
from .protocol import Reward, check_scores, score
from .reduction import Reduction
from .samples import Samples


def check_reward(
    reward: Reward,
    name: str,
    *,
    prompts: Sequence[str] = ("a red circle", "a blue square on the grass"),
    frames: int = 5,
    size: tuple[int, int] = (64, 64),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    sample: Samples | None = None,
    reduce: Reduction | None = None,
) -> None:
    """Score a small random video and take its gradient.

    Args:
        reward: Already on `device`.
        name: What the messages call it.
        prompts: One for each sample of the probe.
        frames: Frames of the probe; a video model may need a certain number.
        size: Its height and width, in pixels.
        device: Where the probe lives, as the rollout's videos will.
        dtype: Floating-point type of the probe.
        sample: What else is known of it, one entry for each prompt.
        reduce: How scores of frames become one.

    Raises:
        UsageError: As `scores_and_gradient`.
    """
    generator = torch.Generator().manual_seed(0)
    video = torch.rand((len(prompts), frames, 3, *size), generator=generator).to(device, dtype)
    scores_and_gradient(reward, name, video, list(prompts), sample, reduce)


def scores_and_gradient(
    reward: Reward,
    name: str,
    video: Tensor,
    prompts: list[str],
    sample: Samples | None = None,
    reduce: Reduction | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores `(B,)` of a video, and the gradient of their weighted sum to its pixels; sample b has the seed b.

    Raises:
        UsageError: It fails; the scores are not a tensor, not `(B,)` or not finite; they carry no gradient, or it is
            not finite, or it is zero everywhere in some sample (a constant, or a score of another sample).
    """
    video = video.detach().requires_grad_()
    with torch.enable_grad():
        with failing_as_usage_error(f"reward {name!r}, on a video {tuple(video.shape)},"):
            scores = score(reward, video, prompts, range(len(prompts)), sample, reduce)
        scores = check_scores(f"reward {name!r}", scores, len(prompts))
    values = scores.detach().tolist()
    context = f"on a video {tuple(video.shape)} it scored {values}"
    if not torch.isfinite(scores).all():
        raise UsageError(f"reward {name!r} is not finite: {context}")
    if not scores.requires_grad:
        raise UsageError(
            f"reward {name!r} has no gradient: its scores do not require grad; "
            f"remove no_grad, detach, item, round or conversions to numpy or PIL ({context})"
        )
    # Different weights, so that gradients of samples compared with each other cannot cancel.
    weights = torch.arange(1, len(prompts) + 1).to(scores)
    (gradient,) = torch.autograd.grad(scores, video, weights, allow_unused=True)
    if gradient is None:
        gradient = torch.zeros_like(video)
    if not torch.isfinite(gradient).all():
        raise UsageError(f"reward {name!r} has a gradient that is not finite ({context})")
    dead = [b for b, sample in enumerate(gradient) if not sample.any()]
    if dead:
        raise UsageError(
            f"reward {name!r} is constant: its gradient is zero in every pixel of sample {dead[0]} ({context})"
        )
    return scores.detach(), gradient

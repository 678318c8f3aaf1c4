"""Is a reward fit for training? Its contract, its gradient, and what it costs, on one clip."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..common.errors import UsageError
from ..common.storage_count import StorageCount
from ..data import procedural
from ..data.video import read_video
from ..objective.reward import FrameReward, Reward, SampledReward
from ..objective.reward.checking import scores_and_gradient
from ..objective.reward.protocol import frames_read, score

_STEPS = (0.03, 0.01, 0.003, 0.001)  # of pixels in [0, 1]
_DIRECTIONS = 4
_BLOCK = 8  # pixels
_TOLERANCE = 0.05
_SEEDS = [0, 1]  # of random frames


def clip(path: str | None, prompt: str | None) -> tuple[Tensor, str]:
    """A video file with its prompt; without one, a clip made by a formula, with its caption if no prompt is given.

    Raises:
        UsageError: The file cannot be read or has no prompt.
    """
    if path is None:
        scene = procedural.Scene("red", "star", "large", "striped", "spinning", "grass")
        return procedural.render(scene, seed=0).transpose(0, 1), scene.caption if prompt is None else prompt
    if prompt is None:
        raise UsageError(f"what does {path} show? Give --prompt too (any, if the reward reads none)")
    return read_video(path)[0], prompt


def examine(reward: Reward, name: str, video: Tensor, prompts: list[str]) -> Iterator[tuple[str, str]]:
    """Check a reward on a clip, the cheap things first; yields what was looked at and what was found.

    The clip, and its mirror image backwards in time with another prompt, are the two samples of a batch. Their pixels
    are first moved away from 0 and 1, at which rewards may clamp.

    Args:
        reward: On the device of the video.
        name: What the messages call it.
        video: `(F, 3, H, W)` in [0, 1].
        prompts: That of the clip, and the other one.

    Raises:
        UsageError: A rule of the contract is broken: the message says which, what came, and where to look.
    """
    count, _, height, width = video.shape
    yield "clip", f"{count} frames of {height}x{width} on {video.device}"
    inner = 0.1 + 0.8 * video
    samples = torch.stack([inner, inner.flip(0, 3)])

    scores, gradient = scores_and_gradient(reward, name, samples, prompts)
    with torch.no_grad():
        own = score(reward, video[None], prompts[:1], _SEEDS[:1])
    yield (
        "score",
        f"{own.item():.6g} (with less contrast {scores[0]:.6g}; mirrored, with another prompt {scores[1]:.6g})",
    )
    _expect_samples_alone(reward, name, samples, prompts, scores)
    yield "contract", "one score a sample, that of its own video and prompt, the same in each call"
    yield "gradient", _reach(reward, name, gradient)
    use = measure(reward, samples[:1], prompts[:1])
    yield "memory", f"{_bytes(use.peak)} at {count} frames, {_bytes(use.each)} for each more, forward and backward"
    yield "time", f"{use.seconds / count:.3g} s a frame, forward and backward"
    available = _available(video.device)
    most = max(0, int((available - use.peak) / use.each) + count)
    yield "frames that fit", f"about {most:,} of this size in the {_bytes(available)} that are free, beside the weights"
    if isinstance(reward, SampledReward) and not reward.exact_gradient:
        gain = ascent(reward, name, samples[:1], prompts[:1])
        yield "ascent", f"a step of 1/255 along the gradient, an approximation, raises the score by {gain:.3g}"
        return
    error, step = finite_differences(reward, name, samples[:1], prompts[:1])
    yield "finite differences", f"{_DIRECTIONS} random directions, relative error {error:.1e} (steps of {step:g})"


def _expect_samples_alone(reward: Reward, name: str, samples: Tensor, prompts: list[str], scores: Tensor) -> None:
    with torch.no_grad():
        again = score(reward, samples, prompts, _SEEDS)
        alone = [score(reward, samples[b : b + 1], prompts[b : b + 1], _SEEDS[b : b + 1]) for b in (0, 1)]
    lone = torch.cat(alone)
    if ((again - scores).abs() > 1e-4 * scores.abs()).any():
        raise UsageError(
            f"reward {name!r} is not a function of its arguments: the same videos scored {scores.tolist()} and then "
            f"{again.tolist()}; put it into eval mode, and let it draw frames by `frames: {{random: n}}` alone"
        )
    # The size of a batch changes rounding, in half precision by a few thousandths.
    allowed = 5e-3 * lone.abs() + 0.05 * (lone[0] - lone[1]).abs()
    if ((lone - scores).abs() > allowed).any():
        raise UsageError(
            f"reward {name!r} must score sample b against prompts[b] whatever else is in the batch: two samples scored "
            f"{scores.tolist()} together, {lone.tolist()} one by one; look for prompts[0], and for sums over the batch"
        )


def _reach(reward: Reward, name: str, gradient: Tensor) -> str:
    total = gradient.shape[1]
    reached = gradient.abs().amax((2, 3, 4)) > 0
    read = frames_read(reward, total, _SEEDS)
    for b, expected in enumerate(read):
        found = reached[b].nonzero().flatten().tolist()
        if missing := sorted(set(expected) - set(found)):
            remedy = (
                "look for detach, or for a choice of frames inside the reward"
                if isinstance(reward, SampledReward)
                else "derive it from FrameReward or SampledReward, whose argument `frames` says what is read; "
                "or, if it should read all frames, look for detach and for indices"
            )
            raise UsageError(
                f"reward {name!r} reads {_spans(expected)} of {total} frames, but its gradient is zero in "
                f"{_spans(missing)}: {remedy}"
            )
        if unread := sorted(set(found) - set(expected)):
            raise UsageError(
                f"reward {name!r} says that it reads frames {_spans(expected)} of {total}, but its gradient reaches "
                f"{_spans(unread)} too: leave the choice of frames to its argument `frames`"
            )
    every = f"all {total} frames" if reached.all() else f"frames {_spans(read[0])} of {total}, which it reads"
    return f"finite, not zero, and reaches {every}; norm {gradient[0].norm():.3g}"


def _spans(frames: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`."""
    starts = [i for i in frames if i - 1 not in frames]
    stops = [i for i in frames if i + 1 not in frames]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True))


def finite_differences(reward: Reward, name: str, video: Tensor, prompts: list[str]) -> tuple[float, float]:
    """Compare the gradient with central differences along random directions.

    Directions are blocks of 8x8 pixels of random sign: what single pixels change drowns in float32 rounding. Modules
    are cast to float32, and stay so.

    Args:
        video: `(1, F, 3, H, W)`, at least 0.03 away from 0 and 1. Of a `FrameReward` four frames are looked at.

    Returns:
        The least relative error, of all directions together, and its step, in units of pixels.

    Raises:
        UsageError: They disagree by more than 5 % at every step.
    """
    if isinstance(reward, nn.Module):
        reward.float()
    video = video[:, :4] if isinstance(reward, FrameReward) else video
    _, gradient = scores_and_gradient(reward, name, video, prompts)
    generator = torch.Generator().manual_seed(0)
    directions = []
    for _ in range(_DIRECTIONS):
        coarse = (*video.shape[:3], *(-(-side // _BLOCK) for side in video.shape[3:]))
        signs = torch.randint(2, coarse, generator=generator).to(video) * 2 - 1
        blocks = signs.repeat_interleave(_BLOCK, 3).repeat_interleave(_BLOCK, 4)
        directions.append(blocks[..., : video.shape[3], : video.shape[4]])
    slopes = torch.stack([(gradient.double() * direction.double()).sum() for direction in directions])

    errors = []
    for step in _STEPS:
        with torch.no_grad():
            above, below = (
                torch.cat([score(reward, video + sign * step * d, prompts, _SEEDS[:1]) for d in directions]).double()
                for sign in (1, -1)
            )
        differences = (above - below) / (2 * step)
        errors.append(((differences - slopes).norm() / slopes.norm()).item())
        if errors[-1] <= _TOLERANCE / 5:  # good enough: smaller steps are nearer to rounding
            break
    if min(errors) <= _TOLERANCE:
        return min(errors), _STEPS[errors.index(min(errors))]
    raise UsageError(
        f"reward {name!r} has a gradient that is not that of its score: along random directions it says "
        f"{_numbers(slopes)}, differences of the score say {_numbers(differences)} (relative error {min(errors):.1e}): "
        "look for detach, round, no_grad, and for operations with a backward pass of their own; if it is meant to be "
        "an approximation, derive from FrameReward or SampledReward and set `exact_gradient = False` in the class"
    )


def ascent(reward: Reward, name: str, video: Tensor, prompts: list[str]) -> float:
    """By how much a step along the gradient, of 1/255 in its largest pixel, raises the score.

    Raises:
        UsageError: It lowers it.
    """
    before, gradient = scores_and_gradient(reward, name, video, prompts)
    with torch.no_grad():
        after = score(reward, video + gradient / (255 * gradient.abs().max()), prompts, _SEEDS[:1])
    gain = (after - before).item()
    if not gain > 0:
        raise UsageError(
            f"reward {name!r} has a gradient that leads away: a step of 1/255 along it changes the score by "
            f"{gain:.3g}; look for a sign, and for operations with a backward pass of their own"
        )
    return gain


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.3g}" for value in values.tolist())


@dataclass(frozen=True)
class Use:
    """Time and memory of scoring a clip with its gradient, beside weights."""

    seconds: float
    peak: float  # bytes
    each: float  # bytes, of one frame more


def measure(reward: Reward, video: Tensor, prompts: list[str]) -> Use:
    """Time and memory of a forward and a backward pass, and from a clip twice as long what a further frame takes."""
    seconds, peak = _run(reward, video, prompts)
    _, longer = _run(reward, torch.cat([video, video], 1), prompts)
    count, each_pixels = video.shape[1], video[0, 0].nbytes
    # The clip itself too; never less than it and its gradient.
    return Use(seconds, peak + video.nbytes, max((longer - peak) / count, each_pixels) + each_pixels)


def _run(reward: Reward, video: Tensor, prompts: list[str]) -> tuple[float, float]:
    """Seconds, and peak of bytes."""

    def forward_backward() -> None:
        leaf = video.detach().requires_grad_()
        torch.autograd.grad(score(reward, leaf, prompts, _SEEDS[:1]).sum(), leaf)

    cuda = video.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(video.device)
        torch.cuda.reset_peak_memory_stats(video.device)
        before = torch.cuda.memory_allocated(video.device)
    start = time.perf_counter()
    forward_backward()
    if cuda:
        torch.cuda.synchronize(video.device)
    seconds = time.perf_counter() - start
    if cuda:
        return seconds, torch.cuda.max_memory_allocated(video.device) - before
    with StorageCount() as storage:  # slower, hence apart
        forward_backward()
    return seconds, storage.peak


def _available(device: torch.device) -> int:
    """Bytes that are free on the device, or on the host for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # comes with accelerate

    return psutil.virtual_memory().available


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

"""Is a reward fit for training? Its contract, its gradient, and what it costs, on one clip."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import UsageError
from ..common.loading import failing_as_usage_error
from ..common.storage_count import StorageCount
from ..data import procedural
from ..data.source import BadFile
from ..data.video import read_video
from ..objective.reward import Reward, SampledReward, Samples
from ..objective.reward.checking import scores_and_gradient
from ..objective.reward.protocol import frames_read, score
from .row_sample import row_sample

# Of pixels in [0, 1]; the small ones would drown in float32.
_STEPS = {torch.float32: (0.03, 0.01, 0.003, 0.001), torch.float64: (3e-4, 1e-4, 3e-5, 1e-5, 3e-6)}
_DIRECTIONS = 4
_NOISE = 0.05  # of the clip, at most
_BLOCK = 8  # pixels
_TOLERANCE = 0.05
_COARSER = 1.0  # error that the step before may have: a smooth score comes near bit by bit
_PLATEAU = 3, 0.7, 1.25  # steps, largest error, ratio of the errors: where it stays so, the score jumps
_FEW = 4  # frames, where so many do
_SEEDS = [0, 1]  # of random frames
_SOUND_RATE = 16_000


def known_of(video: Tensor, fps: float, row: Mapping[str, Any] | None = None) -> Samples:
    """Samples of one, the clip: its frames a second, its first frame, darker, as the image of which it is made, two
    seconds of noise as its sound, and the row of a table, as `row_sample` reads one.

    Raises:
        UsageError: A picture or video of the row cannot be read.
    """
    count, noise = len(video), torch.rand(2, 32_000, generator=torch.Generator().manual_seed(0))
    try:
        found = row_sample(
            row or {}, Path(), fps, [i / fps for i in range(count)], count / fps, (noise - 0.5, _SOUND_RATE)
        )
    except BadFile as bad:
        raise UsageError(f"--row: cannot read {bad}") from None
    # Not the frame itself, on which a distance has no gradient.
    return found if found.images[0] is not None else replace(found, images=[0.9 * video[0]])


def clip(path: str | None, prompt: str | None) -> tuple[Tensor, str, float]:
    """A video file, its prompt and frames a second; without a file, a clip made by a formula, with its caption if no
    prompt is given.

    Raises:
        UsageError: The file cannot be read or has no prompt.
    """
    if path is None:
        scene = procedural.Scene("red", "star", "large", "striped", "spinning", "grass")
        video = procedural.render(scene, seed=0, frames=9).transpose(0, 1)
        return video, scene.caption if prompt is None else prompt, 8.0
    if prompt is None:
        raise UsageError(f"what does {path} show? Give --prompt too (any, if the reward reads none)")
    video, fps = read_video(path)
    return video, prompt, fps


def examine(
    reward: Reward, name: str, video: Tensor, prompts: list[str], sample: Samples | None = None
) -> Iterator[tuple[str, str]]:
    """Check a reward on a clip, the cheap things first; yields what was looked at and what was found.

    The two samples of a batch are the clip and one that is unlike it in all that a reward may be blind for: mirrored,
    backwards, half as fast, in other colours, darker and flatter, with another prompt. Their pixels are away from 0 and
    1, at which rewards may clamp.

    Args:
        reward: On the device of the video.
        name: What the messages call it.
        video: `(F, 3, H, W)` in [0, 1].
        prompts: That of the clip, and the other one.
        sample: What else is known of the clip, for a reward that reads it; the other sample has pictures and videos
            that are unlike these too.

    Raises:
        UsageError: A rule of the contract is broken: the message says which, what came, and where to look.
    """
    count, _, height, width = video.shape
    yield "clip", f"{count} frames of {height}x{width} on {video.device}"
    samples = torch.stack([0.1 + 0.8 * video, _unlike(video)])
    known = (Samples(1) if sample is None else sample).to(video.device)
    both = _with_another(known)

    scores, gradient = _undisturbed(reward, name, samples, prompts, both)
    with torch.no_grad():
        own = score(reward, video[None], prompts[:1], _SEEDS[:1], known)
    yield (
        "score",
        f"{own.item():.6g} (with less contrast {scores[0]:.6g}; of another video, with another prompt {scores[1]:.6g})",
    )
    _expect_a_function(reward, name, samples, prompts, both, scores)
    _expect_samples_alone(reward, name, samples, prompts, both, scores, gradient)
    yield "contract", "one score a sample, that of its own video and prompt, the same in each call"
    yield "gradient", _reach(reward, name, gradient)
    enough = _few(reward, samples[:1], prompts[:1], known)
    few, known_of_few = samples[:1, :enough], known.choose_frames([range(enough)], count)
    _expect_finite(reward, name, few, prompts[:1], known_of_few)
    yield "black, grey, white", "scores and gradients are finite"
    use = measure(reward, samples[:1], prompts[:1], known)
    yield "memory", f"{_bytes(use.peak)} at {count} frames, {_bytes(use.each)} for each more, forward and backward"
    yield "time", f"{use.seconds / count:.3g} s a frame, forward and backward"
    available = _available(video.device)
    most = max(0, int((available - use.peak) / use.each) + count)
    yield "frames that fit", f"about {most:,} of this size in the {_bytes(available)} that are free, beside the weights"
    if isinstance(reward, SampledReward) and not reward.exact_gradient:
        gain = ascent(reward, name, samples[:1], prompts[:1], known)
        yield "ascent", f"a step of 1/255 along the gradient, an approximation, raises the score by {gain:.3g}"
        return
    error, step = finite_differences(reward, name, few, prompts[:1], known_of_few)
    yield "finite differences", f"{_DIRECTIONS} random directions, relative error {error:.1e} (steps of {step:g})"


def _unlike(video: Tensor) -> Tensor:
    """Another video of this size, in [0.15, 0.7], that shares with `video` no mean, spread, colour, order or speed."""
    times = torch.linspace(len(video) / 2, 0, len(video), device=video.device).clamp(max=len(video) - 1)
    before = times.long()
    part = (times - before).view(-1, 1, 1, 1).to(video)
    slow = video[before] * (1 - part) + video[(before + 1).clamp(max=len(video) - 1)] * part
    return 0.15 + 0.55 * slow.flip(3).roll(1, 1).square()


def _with_another(known: Samples) -> Samples:
    """The sample, and one whose pictures and videos are unlike its own."""
    other = replace(
        known,
        images=[image if image is None else _unlike(image[None])[0] for image in known.images],
        videos={role: [_unlike(video) for video in of] for role, of in known.videos.items()},
        audio=[sound if sound is None else 0.5 * sound.flip(1) for sound in known.audio],
    )
    return Samples(
        2,
        [*known.fps, *other.fps],
        [*known.images, *other.images],
        {role: [*of, *other.videos[role]] for role, of in known.videos.items()},
        [*known.audio, *other.audio],
        known.audio_rate,
        [*known.rows, *other.rows],
    )


def _undisturbed(
    reward: Reward, name: str, samples: Tensor, prompts: list[str], known: Samples
) -> tuple[Tensor, Tensor]:
    """Scores and gradient, of a call that changes nothing but these."""
    torch.rand(())  # a seed that was set before would set the same state
    given, texts, random = samples.clone(), list(prompts), torch.get_rng_state()
    found = scores_and_gradient(reward, name, samples, texts, known)
    if not torch.equal(samples, given) or texts != prompts:
        raise UsageError(
            f"reward {name!r} changes the {'prompts' if texts != prompts else 'video'} that it is given, which other "
            "rewards read after it: work on a copy, without functions in place such as `clamp_`"
        )
    if not torch.equal(torch.get_rng_state(), random):
        raise UsageError(
            f"reward {name!r} draws from torch's global random numbers, or seeds them, which changes the videos of a "
            "run: put it into eval mode, let it draw frames by `frames: {random: n}` alone, or give it a generator of "
            "its own"
        )
    return found


def _expect_a_function(
    reward: Reward, name: str, samples: Tensor, prompts: list[str], known: Samples, scores: Tensor
) -> None:
    with torch.no_grad():
        again = score(reward, samples, prompts, _SEEDS, known)
    if ((again - scores).abs() > _rounding(reward, scores)).any():
        raise UsageError(
            f"reward {name!r} is not a function of its arguments: the same videos scored {scores.tolist()} and then "
            f"{again.tolist()}; put it into eval mode, keep nothing from call to call, and let it draw frames by "
            "`frames: {random: n}` alone"
        )


def _expect_samples_alone(
    reward: Reward,
    name: str,
    samples: Tensor,
    prompts: list[str],
    known: Samples,
    scores: Tensor,
    gradient: Tensor,
) -> None:
    with torch.no_grad():
        alone = [
            score(reward, samples[b : b + 1], prompts[b : b + 1], _SEEDS[b : b + 1], known.take([b])) for b in (0, 1)
        ]
    lone = torch.cat(alone)
    allowed = _rounding(reward, lone) + 0.02 * (lone[0] - lone[1]).abs()
    if ((lone - scores).abs() > allowed).any():
        raise UsageError(
            f"reward {name!r} must score sample b against prompts[b] whatever else is in the batch: two samples scored "
            f"{scores.tolist()} together, {lone.tolist()} one by one; look for prompts[0], and for sums over the batch"
        )
    _, own = scores_and_gradient(reward, name, samples[:1], prompts[:1], known.take([0]))
    off = ((gradient[:1] - own).double().norm() / own.double().norm()).item()
    if off > 0.1:
        raise UsageError(
            f"reward {name!r} must score each sample by itself: in a batch of two the gradient of the first differs "
            f"from the one that it has alone (relative error {off:.1e}); look for sums over the batch"
        )


def _rounding(reward: Reward, scores: Tensor) -> Tensor:
    """How far equal scores may differ: the size of a batch changes the order of sums."""
    weights = reward.parameters() if isinstance(reward, nn.Module) else ()
    half = any(weight.element_size() < 4 for weight in weights)
    return (5e-3 if half else 1e-4) * scores.abs()


def _expect_finite(reward: Reward, name: str, video: Tensor, prompts: list[str], known: Samples) -> None:
    for colour, level in (("black", 0.0), ("grey", 0.5), ("white", 1.0)):
        flat = torch.full_like(video, level).requires_grad_()
        with failing_as_usage_error(f"reward {name!r}, on a {colour} video,"):
            found = score(reward, flat, prompts, _SEEDS[:1], known)
        (gradient,) = torch.autograd.grad(found.sum(), flat, allow_unused=True)
        if not found.isfinite().all() or not (gradient is None or gradient.isfinite().all()):
            what = "score" if not found.isfinite().all() else "gradient"
            raise UsageError(
                f"reward {name!r} has a {what} that is not finite on a {colour} video, as a model may make one: give "
                "roots, logarithms and quotients an epsilon"
            )


def _few(reward: Reward, video: Tensor, prompts: list[str], known: Samples) -> int:
    """How many frames do for what needs no more: a few; all, if the reward takes no fewer."""
    try:
        with torch.no_grad():
            part = known.choose_frames([range(min(_FEW, video.shape[1]))], video.shape[1])
            enough = bool(score(reward, video[:, :_FEW], prompts, _SEEDS[:1], part).isfinite().all())
    except Exception:  # what a reward raises for too few is its own affair
        enough = False
    return _FEW if enough else video.shape[1]


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


def finite_differences(
    reward: Reward, name: str, video: Tensor, prompts: list[str], known: Samples | None = None
) -> tuple[float, float]:
    """Compare the gradient with central differences along random directions.

    Directions are blocks of 8x8 pixels of random sign: what single pixels change drowns in float32 rounding. Small
    steps are taken in float64, if the reward can. Modules are cast to these types, and stay so. The clip has a little
    noise: where it stands still, the slope of an absolute difference would be that of rounding.

    Args:
        video: `(1, F, 3, H, W)`, at least 0.08 away from 0 and 1.
        known: What else is known of it.

    Returns:
        The relative error, of all directions together, at the coarsest step that will do, and this step, in units of
        pixels.

    Raises:
        UsageError: They disagree by more than 5 % at every step, or agree at a small one all of a sudden, as they do
            where a score jumps: so few pixels jump then that none is met.
    """
    noise = torch.rand(video.shape, generator=torch.Generator().manual_seed(1)).to(video)
    video = video + _NOISE * (2 * noise - 1)
    seen: list[_Comparison] = []
    for found in _comparisons(reward, name, video, prompts, known):
        sudden = bool(seen) and seen[-1].error > _COARSER
        if found.error <= _TOLERANCE and not sudden:
            return found.error, found.step
        seen.append(found)
        if found.error <= _TOLERANCE or _stays([comparison.error for comparison in seen]):
            break
    best = min(seen, key=lambda comparison: comparison.error)
    raise UsageError(
        f"reward {name!r} has a gradient that is not that of its score: along random directions it says "
        f"{_numbers(best.slopes)}, differences of the score say {_numbers(best.differences)} (relative error "
        f"{best.error:.1e}): look for detach, round, no_grad, and for operations with a backward pass of their own; if "
        "it is meant to be an approximation, derive from FrameReward or SampledReward and set `exact_gradient = False` "
        "in the class"
    )


def _stays(errors: list[float]) -> bool:
    """True if the last errors are the same whatever the step: what curves would come nearer with each smaller one."""
    count, most, ratio = _PLATEAU
    last = errors[-count:]
    return len(last) == count and max(last) < most and max(last) < ratio * min(last)


@dataclass(frozen=True)
class _Comparison:
    """Slopes along the directions by the gradient, and by differences over a step."""

    step: float
    slopes: Tensor
    differences: Tensor

    @property
    def error(self) -> float:
        return ((self.differences - self.slopes).norm() / self.slopes.norm()).item()


def _comparisons(
    reward: Reward, name: str, video: Tensor, prompts: list[str], known: Samples | None
) -> Iterator[_Comparison]:
    generator = torch.Generator().manual_seed(0)
    coarse = (_DIRECTIONS, *video.shape[1:3], *(-(-side // _BLOCK) for side in video.shape[3:]))
    signs = torch.randint(2, coarse, generator=generator).to(video.device) * 2 - 1
    blocks = signs.repeat_interleave(_BLOCK, 3).repeat_interleave(_BLOCK, 4)
    directions = blocks[..., : video.shape[3], : video.shape[4]].unsqueeze(1)
    for dtype, steps in _STEPS.items():
        if isinstance(reward, nn.Module):
            reward.to(dtype)
        video = video.to(dtype)
        try:
            _, gradient = scores_and_gradient(reward, name, video, prompts, known)
        except UsageError:
            if dtype == torch.float32:
                raise
            return  # not every reward computes in float64
        slopes = (gradient.double() * directions).flatten(1).sum(1)
        for step in steps:
            with torch.no_grad():
                above, below = (
                    torch.cat(
                        [score(reward, video + sign * step * d, prompts, _SEEDS[:1], known) for d in directions]
                    ).double()
                    for sign in (1, -1)
                )
            yield _Comparison(step, slopes, (above - below) / (2 * step))


def ascent(reward: Reward, name: str, video: Tensor, prompts: list[str], known: Samples | None = None) -> float:
    """By how much a step along the gradient, of 1/255 in its largest pixel, raises the score.

    Raises:
        UsageError: It lowers it.
    """
    before, gradient = scores_and_gradient(reward, name, video, prompts, known)
    with torch.no_grad():
        after = score(reward, video + gradient / (255 * gradient.abs().max()), prompts, _SEEDS[:1], known)
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


def measure(reward: Reward, video: Tensor, prompts: list[str], known: Samples | None = None) -> Use:
    """Time and memory of a forward and a backward pass, and from a clip twice as long what a further frame takes."""
    count, each_pixels = video.shape[1], video[0, 0].nbytes
    seconds = _seconds(reward, video, prompts, known)
    twice = None if known is None else known.choose_frames([[*range(count)] * 2], count)
    peak, longer = _peak(reward, video, prompts, known), _peak(reward, torch.cat([video, video], 1), prompts, twice)
    # The clip itself too; never less than it and its gradient.
    return Use(seconds, peak + video.nbytes, max((longer - peak) / count, each_pixels) + each_pixels)


def _forward_backward(reward: Reward, video: Tensor, prompts: list[str], known: Samples | None) -> None:
    leaf = video.detach().requires_grad_()
    torch.autograd.grad(score(reward, leaf, prompts, _SEEDS[:1], known).sum(), leaf)


def _seconds(reward: Reward, video: Tensor, prompts: list[str], known: Samples | None) -> float:
    cuda = video.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(video.device)
    start = time.perf_counter()
    _forward_backward(reward, video, prompts, known)
    if cuda:
        torch.cuda.synchronize(video.device)
    return time.perf_counter() - start


def _peak(reward: Reward, video: Tensor, prompts: list[str], known: Samples | None) -> float:
    """Bytes."""
    if video.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(video.device)
        before = torch.cuda.memory_allocated(video.device)
        _forward_backward(reward, video, prompts, known)
        return torch.cuda.max_memory_allocated(video.device) - before
    with StorageCount() as storage:  # slower, hence apart
        _forward_backward(reward, video, prompts, known)
    return storage.peak


def _available(device: torch.device) -> int:
    """Bytes that are free on the device, or on the host for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # comes with accelerate

    return psutil.virtual_memory().available


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

"""Videos as a diffusers pipeline makes them, with a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..common.arguments import whole_number
from ..common.errors import UsageError
from ..decoding.backprop import Backprop, Exact
from ..decoding.decode import decode
from .call_checks import VIDEOS, check_call
from .checkpointing import Checkpointing
from .differentiable import Sampling, differentiable, performed
from .gradient_steps import GradientSteps, Observe
from .last_step import RecordedLastStep, RepeatedLastStep
from .outputs import expect_sound, frames_of, sound_of
from .randomness import restore, states
from .steps import LastSteps, StepPolicy, expect_step_policy

__all__ = ["RolloutPart", "check_call", "differentiable", "rollout", "rollout_parts"]


@overload
def rollout(
    pipe: Any,
    steps: StepPolicy = ...,
    backprop: Backprop = ...,
    *,
    checkpointing: Checkpointing = ...,
    steps_seed: int = 0,
    audio: Literal[False] = False,
    **call_kwargs: Any,
) -> Tensor: ...


@overload
def rollout(
    pipe: Any,
    steps: StepPolicy = ...,
    backprop: Backprop = ...,
    *,
    checkpointing: Checkpointing = ...,
    steps_seed: int = 0,
    audio: Literal[True],
    **call_kwargs: Any,
) -> tuple[Tensor, Tensor]: ...


def rollout(
    pipe: Any,
    steps: StepPolicy = LastSteps(1),  # noqa: B008 (frozen)
    backprop: Backprop = Exact(),  # noqa: B008 (frozen)
    *,
    checkpointing: Checkpointing = Checkpointing(),  # noqa: B008 (frozen)
    steps_seed: int = 0,
    audio: bool = False,
    **call_kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return what `pipe(**call_kwargs, output_type="pt").frames` is, bit for bit, with a gradient.

    The gradient reaches the weights of the denoiser that require one (its LoRA), and those of the VAE's decoder. Text
    and image encoders run without. Under `torch.no_grad` it is the plain call. One call of the denoiser has its
    activations at a time; `checkpointing` says otherwise.

    A stochastic scheduler draws from the call's `generator`, with one for each video from that video's, also where the
    pipeline itself would leave it to the global random state; so does the plain call in `seeded`.

    Args:
        pipe: A diffusers pipeline that makes videos, with its modules on one device, not offloaded.
        steps: The denoising steps to backpropagate through.
        backprop: How to backpropagate through the decoder.
        checkpointing: What is kept of the denoiser's calls until the backward pass.
        steps_seed: Decides what a random policy draws; give each training step its own.
        audio: Also return the sound, of a pipeline that makes some.
        call_kwargs: Arguments of the pipeline's own call, except `output_type` and `return_dict`.

    Returns:
        Frames `(B, F, C, H, W)` in [0, 1] (see `frames_of`). With `LowVariance(n)` those of its `n + 1` clips one after
        the other, `((n + 1) B, F, C, H, W)`, of which the first B are the pipeline's. With `audio`, frames and sound,
        which is as the pipeline returns it, for LTX-2 `(B, channels, samples)`.

    Raises:
        UsageError: See `check_call` and `differentiable`; in the backward pass: weights that changed since the rollout.
    """
    if whole_number("rollout: steps_seed", steps_seed, 0) >= 2**64:
        raise UsageError(f"rollout: steps_seed={steps_seed}: expected a seed below 2^64")
    check_call(pipe, call_kwargs)
    if audio:
        expect_sound(pipe, call_kwargs)
    with _several_videos_in_words(pipe, call_kwargs):
        parts = [
            *rollout_parts(
                pipe, call_kwargs, steps, backprop, checkpointing=checkpointing, steps_seed=steps_seed, audio=audio
            )
        ]
    video = _joined([part.video for part in parts])
    return (video, _joined([part.audio for part in parts if part.audio is not None])) if audio else video


@contextmanager
def _several_videos_in_words(pipe: Any, call: Mapping[str, Any]) -> Iterator[None]:
    """Raise a UsageError for what goes wrong in a call for several videos of a prompt, which many pipelines get wrong.

    It is a mismatch of shapes in the first step, since they repeat the prompt and not the image or the history.
    """
    try:
        yield
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        key = next((key for key in VIDEOS if (call.get(key) or 1) > 1), None)
        if key is None:
            raise
        raise UsageError(
            f"rollout: {type(pipe).__name__} fails with {key}={call[key]} ({error}); leave it out, and repeat the "
            "prompt, or call it once for each video"
        ) from error


def _joined(clips: list[Tensor]) -> Tensor:
    return clips[0] if len(clips) == 1 else torch.cat(clips)


class RolloutPart(NamedTuple):
    """Clips of a rollout that are decoded together, one for each prompt.

    Attributes:
        video: `(B, F, C, H, W)` in [0, 1], or latents.
        share: The part that they have in the mean over all clips of a rollout.
        rest: Parts that are still to come.
        audio: The sound, if it was asked for.
    """

    video: Tensor
    share: float
    rest: int
    audio: Tensor | None = None


def rollout_parts(
    pipe: Any,
    call_kwargs: Mapping[str, Any],
    steps: StepPolicy,
    backprop: Backprop,
    *,
    checkpointing: Checkpointing = Checkpointing(),  # noqa: B008 (frozen)
    decode: Callable[..., Tensor] = decode,
    output_type: str = "pt",
    steps_seed: int = 0,
    observe: Observe | None = None,
    audio: bool = False,
) -> Iterator[RolloutPart]:
    """Make a rollout part by part, so that each can be backpropagated before the next is made.

    All policies but `LowVariance` make a single part, whose share is 1. The noise of its repetitions is drawn from the
    call's generators, after what the pipeline draws; whatever the pipeline itself draws for them, as noise on an image,
    is what it drew for the first part.

    Args:
        pipe: As for `rollout`.
        call_kwargs: Arguments of the pipeline's call, checked already.
        steps: The denoising steps to backpropagate through.
        backprop: How to backpropagate through the decoder.
        checkpointing: What is kept of the denoiser's calls until the backward pass.
        decode: Takes the place of `chopgrad_align.decode`.
        output_type: `"pt"`, or `"latent"` for latents that are not decoded.
        steps_seed: Decides what a random policy draws.
        observe: Is told of the denoiser's calls that have a graph, before its clips are yielded.
        audio: As for `rollout`.

    Raises:
        UsageError: See `differentiable`.
    """
    expect_step_policy(steps)

    def made(sampling: Sampling) -> tuple[Tensor, Tensor | None]:
        with performed(pipe, sampling, backprop, decode, audio) as call:
            output = call(**call_kwargs, output_type=output_type)
        return frames_of(pipe, output, output_type), sound_of(output) if audio else None

    generator = call_kwargs.get("generator")
    before = states(generator)
    record = RecordedLastStep(GradientSteps(pipe, steps, steps_seed, observe, generator, checkpointing))
    video, sound = made(record)
    repeats = record.steps.plan.repeats
    yield RolloutPart(video, 1 / (repeats + 1), repeats, sound)
    del video, sound  # with their graph, before the next clips are made
    for rest in reversed(range(repeats)):
        noise = _noise_like(record.clean, generator)
        after = states(generator)
        restore(generator, before)
        again = GradientSteps(pipe, steps, steps_seed, observe, generator, checkpointing)
        repetition = RepeatedLastStep(again, record, noise)
        video, sound = made(repetition)
        restore(generator, after)
        yield RolloutPart(video, 1 / (repeats + 1), rest, sound)
        del video, sound


def _noise_like(latents: Tensor, generator: Any) -> Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)

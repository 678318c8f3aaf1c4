"""Checks of a pipeline's call that can be made before it samples."""

from __future__ import annotations

import inspect
import math
import re
import typing
from collections.abc import Collection, Mapping
from types import NoneType, UnionType
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..common.arguments import nearest, whole_number
from ..common.errors import UsageError
from ..decoding.decoders import known_decoder
from .call_shape import FRAMES
from .denoisers import denoisers_of
from .outputs import expect_frames
from .steps import StepPolicy, expect_step_policy, plan_of

_VIDEOS = ("num_videos_per_prompt", "num_images_per_prompt")  # for each prompt, by one of these names
_COUNTS = ("num_inference_steps", *FRAMES, "height", "width", *_VIDEOS, "max_sequence_length")
_PROMPTS = ("prompt", "negative_prompt")
_SCHEDULES = ("timesteps", "sigmas")
_STRENGTHS = ("denoise_strength", "strength")  # of pipelines that start from a video; the first that a call has


def check_call(
    pipe: Any, call_kwargs: Mapping[str, Any], steps: StepPolicy | None = None, reserved: Collection[str] = ()
) -> None:
    """Check the arguments of a rollout that can be checked before sampling.

    Args:
        pipe: A diffusers pipeline.
        call_kwargs: Arguments of its call.
        steps: The sampling policy, if it is to be held to the number of steps. `rollout` itself lets `LastSteps(50)`
            mean every step of 30.
        reserved: Arguments that the caller adds by itself, and that may not be among `call_kwargs`.

    Raises:
        UsageError: Something else than a video pipeline, a VAE that `decode` does not know; an argument that the
            pipeline does not have, that `rollout` or its caller sets, or that has a wrong type or range; a number of
            frames or a size that the pipeline would round; a policy that asks for steps that the sampler does not take,
            or for constants of a guidance that is off.
    """
    name = type(pipe).__name__
    if hasattr(pipe, "hdr_video_processor"):
        raise UsageError(f"rollout: {name} makes linear light without an upper bound, not frames in [0, 1]")
    if getattr(pipe, "vae", None) is None or not hasattr(pipe, "video_processor"):
        raise UsageError(f"rollout: expected a diffusers pipeline that makes videos with a VAE, got {name}")
    expect_frames(pipe)
    known_decoder(pipe.vae)
    parameters = inspect.signature(type(pipe).__call__).parameters
    _check_names(name, call_kwargs, parameters, reserved)
    for key, value in call_kwargs.items():
        _check_value(key, value, parameters.get(key))
    if call_kwargs.get("skip_steps_sigma_threshold") is not None and call_kwargs["skip_steps_sigma_threshold"] < 1:
        raise UsageError(
            "rollout: skip_steps_sigma_threshold: the steps that it skips are not known before; leave it out"
        )
    _check_schedule(pipe, call_kwargs)
    _check_lengths(pipe, call_kwargs)
    _check_grid(pipe, call_kwargs)
    call = {key: parameter.default for key, parameter in parameters.items()} | dict(call_kwargs)
    num_steps = _check_num_steps(pipe, call)
    if steps is not None:
        _check_steps(steps, num_steps, call)


def _check_names(
    pipe: str, call: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter], reserved: Collection[str]
) -> None:
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in call:
        if key in ("output_type", "return_dict"):
            raise UsageError(f"rollout sets {key} itself, because it returns frames as a tensor: leave it out")
        if key in reserved:
            raise UsageError(f"{key} is set for each video of a run, from its prompt or its seed: leave it out")
        if key not in parameters and not open_ended:
            raise UsageError(f"rollout: {pipe} takes no argument {key!r}{nearest(key, parameters)}")


def _check_value(key: str, value: Any, parameter: inspect.Parameter | None) -> None:
    """Check the type and the range of one argument; the pipeline's signature declares the types of numbers."""
    kinds = set() if parameter is None else _declared(parameter.annotation)
    optional = parameter is None or parameter.default is None or NoneType in kinds or key in _PROMPTS
    kinds -= {NoneType}
    if value is None and optional:
        return
    if key in _COUNTS:
        whole_number(f"rollout: {key}", value)
    elif key in _PROMPTS:
        texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UsageError(f"rollout: {key}={value!r}: expected a text, or a list of texts")
    elif key == "generator":
        if not all(isinstance(part, torch.Generator) for part in (value if isinstance(value, list) else [value])):
            raise UsageError(f"rollout: generator={value!r}: expected a torch.Generator, or a list with one a video")
    elif key == "latents":
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise UsageError(f"rollout: latents: expected a tensor of floating point, got {type(value).__name__}")
    elif kinds == {int}:
        whole_number(f"rollout: {key}", value, 0)
    elif kinds == {bool}:
        if not isinstance(value, bool):
            raise UsageError(f"rollout: {key}={value!r}: expected True or False")
    elif kinds == {float} and not _is_number(value):
        raise UsageError(f"rollout: {key}={value!r}: expected a finite number")
    if key in _STRENGTHS and kinds == {float} and not 0 < value <= 1:
        raise UsageError(f"rollout: {key}={value!r}: expected a number above 0, up to 1")


def _declared(annotation: Any) -> set[Any]:
    """The types of an annotation, of which a union has several."""
    union = typing.get_origin(annotation) in (typing.Union, UnionType)
    return set(typing.get_args(annotation)) if union else {annotation}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_schedule(pipe: Any, call: Mapping[str, Any]) -> None:
    """Check a schedule of one's own, and that the scheduler takes it."""
    for key in _SCHEDULES:
        values = call.get(key)
        if values is None:
            continue
        if not isinstance(values, list) or not values or not all(map(_is_number, values)):
            raise UsageError(f"rollout: {key}={values!r}: expected a list of finite numbers")
        if key not in inspect.signature(type(pipe.scheduler).set_timesteps).parameters:
            raise UsageError(
                f"rollout: {type(pipe.scheduler).__name__} takes no {key}: use num_inference_steps, or another "
                "scheduler"
            )


def _check_lengths(pipe: Any, call: Mapping[str, Any]) -> None:
    """Check that lists with an entry for each prompt, or each video, are as long as that of the prompts."""
    key, each = next(((key, call[key]) for key in _VIDEOS if call.get(key)), (_VIDEOS[0], 1))
    if each > 1 and re.search(rf"^ +{key} = 1$", inspect.getsource(inspect.unwrap(type(pipe).__call__)), re.MULTILINE):
        raise UsageError(
            f"rollout: {type(pipe).__name__} makes one video a prompt, whatever {key} says: leave it out, and repeat "
            "the prompt"
        )
    if (prompt := call.get("prompt")) is None:
        return
    prompts = len(prompt) if isinstance(prompt, list) else 1
    videos = prompts * each
    for key, count in (("negative_prompt", prompts), ("generator", videos)):
        if isinstance(call.get(key), list) and len(call[key]) != count:
            raise UsageError(f"rollout: {key}: expected a list of {count}, got one of {len(call[key])}")


def _check_grid(pipe: Any, call: Mapping[str, Any]) -> None:
    for key, (multiple, offsets) in _grid(pipe).items():
        value = call.get(key)
        if value is not None and value % multiple not in offsets:
            made = (count * multiple + offset for count in range(value // multiple + 2) for offset in offsets)
            near = min((count for count in made if count), key=lambda count: abs(count - value))
            rule = " or ".join(
                f"{multiple}k + {offset}" if offset else f"multiples of {multiple}" for offset in offsets
            )
            raise UsageError(
                f"rollout: {type(pipe).__name__} would round {key}={value}; it makes {rule}, the nearest is {near}"
            )


def _check_num_steps(pipe: Any, call: Mapping[str, Any]) -> int | None:
    """The number of steps that a call will take, by its arguments; None if they do not tell."""
    count = call.get("num_inference_steps")
    for key in _SCHEDULES:
        if isinstance(call.get(key), list):
            count = len(call[key])
    if type(count) is not int:
        return None
    strength = next((call[key] for key in _STRENGTHS if key in call), None)
    if not hasattr(pipe, "get_timesteps") or not _is_number(strength):
        return count
    taken = min(int(count * strength), count)
    if taken < 1:
        raise UsageError(
            f"rollout: strength={strength} of num_inference_steps={count} leaves no step to take; raise one of them"
        )
    return taken


def _check_steps(steps: StepPolicy, num_steps: int | None, call: Mapping[str, Any]) -> None:
    expect_step_policy(steps)
    if num_steps is None:
        return
    plan = plan_of(steps, num_steps, 0)
    if plan.surplus:
        raise UsageError(
            f"{steps!r} asks for {plan.surplus + num_steps} steps, but the sampler takes {num_steps}; ask for at most "
            "as many, or raise num_inference_steps"
        )
    scales = [call[key] for key in ("guidance_scale", "max_guidance_scale") if _is_number(call.get(key))]
    if not plan.unconditional and scales and max(scales) <= 1:
        raise UsageError(
            f"{steps!r}: guidance_scale={max(scales)} makes no unconditional prediction that could be taken for a "
            "constant; leave unconditional=False out"
        )


def _grid(pipe: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
    """The frames and sizes that a pipeline makes exactly, as (multiple, remainders); only what it tells."""
    grid: dict[str, tuple[int, tuple[int, ...]]] = {}
    frames = _first_of(pipe, "scale_factor_temporal", "temporal_compression_ratio", "temporal_scale_factor")
    if frames and not hasattr(pipe, "_match_num_frames"):  # Cosmos 2.5 repeats frames or cuts them off
        multiple = frames
        remainders: tuple[int, ...] = (1,)
        names = {cls.__name__ for cls in type(pipe.vae).__mro__}
        if "AutoencoderKLCogVideoX" in names:
            # Decodes latent frames two by two, an odd one with the first ones: of 2k of them it makes 8k frames, of
            # 2k + 1 one more.
            multiple, remainders = multiple * pipe.vae.num_latent_frames_batch_size, (1, 0)
        if "AutoencoderKLAllegro" in names:  # has no first latent frame that is a single frame
            remainders = (0,)
        grid |= dict.fromkeys(FRAMES, (multiple, remainders))
    if pixels := _first_of(
        pipe, "scale_factor_spatial", "spatial_compression_ratio", "spatial_scale_factor", "scale_factor"
    ):
        patch = next(iter(denoisers_of(pipe).values())).config.get("patch_size", 1)
        height, width = (patch, patch) if isinstance(patch, int) else patch[-2:]
        grid |= {"height": (pixels * height, (0,)), "width": (pixels * width, (0,))}
    return grid


def _first_of(pipe: Any, *names: str) -> int | None:
    """An attribute of the pipeline about its VAE, under the first of the names that it has."""
    return next((value for name in names if (value := getattr(pipe, f"vae_{name}", None))), None)

"""Any diffusers video pipeline, differentiable, by its own code.

The pipeline runs its own `__call__`, taken from under its `torch.no_grad`, with three methods of its components
replaced for the time of the call: `scheduler.step` counts, so that gradient begins where the sampling policy says; the
denoiser's `forward` is run again in the backward pass instead of keeping its activations; `vae.decode` becomes
`chopgrad_align.decode`. Guidance, conditioning, de-normalisation and post-processing stay the pipeline's.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from ..common.errors import UsageError
from ..common.versions import versions
from ..decoding.backprop import Backprop, Exact, expect_policy
from ..decoding.clamp import denormalized
from ..decoding.decode import decode
from ..decoding.decoders import known_decoder
from .steps import LastSteps

DENOISERS = ("transformer", "transformer_2", "unet", "controlnet")
"""The pipeline components that are called in every denoising step."""


def rollout(
    pipe: Any,
    steps: LastSteps = LastSteps(1),  # noqa: B008 (frozen)
    backprop: Backprop = Exact(),  # noqa: B008 (frozen)
    **call_kwargs: Any,
) -> Tensor:
    """What `pipe(**call_kwargs, output_type="pt").frames` returns, bit for bit, with a gradient.

    The gradient reaches the weights of the denoiser that require one (its LoRA), and those of the VAE's decoder. Text
    and image encoders run without. Under `torch.no_grad` it is the plain call. One call of the denoiser keeps its
    activations at a time; for one block's, also call `pipe.transformer.enable_gradient_checkpointing()`.

    Args:
        pipe: A diffusers pipeline whose output has `.frames`, with its modules on one device, not offloaded.
        steps: Through which denoising steps to backpropagate.
        backprop: How to backpropagate through the decoder.
        call_kwargs: What the pipeline's own call takes, except `output_type` and `return_dict`.

    Returns:
        Frames `(B, F, C, H, W)` in [0, 1].

    Raises:
        UsageError: See `check_call` and `differentiable`; in the backward pass: weights that changed since the rollout.
    """
    check_call(pipe, call_kwargs)
    with differentiable(pipe, steps, backprop) as call:
        return call(**call_kwargs, output_type="pt").frames


def check_call(pipe: Any, call_kwargs: Mapping[str, Any]) -> None:
    """Check the arguments of a rollout that can be checked before sampling.

    Raises:
        UsageError: Something else than a video pipeline, a VAE that `decode` does not know, an argument that the
            pipeline does not have or that `rollout` sets itself, or a number of frames or a size that it would round.
    """
    name = type(pipe).__name__
    if getattr(pipe, "vae", None) is None or not hasattr(pipe, "video_processor"):
        raise UsageError(f"rollout: expected a diffusers pipeline that makes videos with a VAE, got {name}")
    known_decoder(pipe.vae)
    parameters = inspect.signature(type(pipe).__call__).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in call_kwargs:
        if key in ("output_type", "return_dict"):
            raise UsageError(f"rollout sets {key} itself, because it returns frames as a tensor: leave it out")
        if key not in parameters and not open_ended:
            near = difflib.get_close_matches(key, parameters, 1, cutoff=0)[0]
            raise UsageError(f"rollout: {name} takes no argument {key!r}; the nearest is {near!r}")

    for key, (multiple, offset) in _grid(pipe).items():
        value = call_kwargs.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"rollout: {key}={value!r}: expected a whole number, 1 or more")
        if value % multiple != offset % multiple:
            nearest = max(round((value - offset) / multiple), 1 - offset) * multiple + offset
            rule = f"{multiple}k + {offset}" if offset else f"multiples of {multiple}"
            raise UsageError(f"rollout: {name} would round {key}={value}; it makes {rule}, the nearest is {nearest}")


def _grid(pipe: Any) -> dict[str, tuple[int, int]]:
    """The frames and sizes that a pipeline makes exactly, as (multiple, offset); only what it tells."""
    grid: dict[str, tuple[int, int]] = {}
    if frames := _first_of(pipe, "scale_factor_temporal", "temporal_compression_ratio", "temporal_scale_factor"):
        multiple, offset = frames, 1
        names = {cls.__name__ for cls in type(pipe.vae).__mro__}
        if "AutoencoderKLCogVideoX" in names:  # decodes latent frames two by two, and an odd one only at first
            multiple *= pipe.vae.num_latent_frames_batch_size
        if "AutoencoderKLAllegro" in names:  # has no first latent frame that is a single frame
            offset = 0
        grid["num_frames"] = (multiple, offset)
    if pixels := _first_of(
        pipe, "scale_factor_spatial", "spatial_compression_ratio", "spatial_scale_factor", "scale_factor"
    ):
        patch = next(iter(_denoisers(pipe).values())).config.get("patch_size", 1)
        height, width = (patch, patch) if isinstance(patch, int) else patch[-2:]
        grid |= {"height": (pixels * height, 0), "width": (pixels * width, 0)}
    return grid


def _first_of(pipe: Any, *names: str) -> int | None:
    """What a pipeline tells of its VAE, under the first of the names that it has."""
    return next((value for name in names if (value := getattr(pipe, f"vae_{name}", None))), None)


@contextlib.contextmanager
def differentiable(
    pipe: Any, steps: LastSteps, backprop: Backprop, decode: Callable[..., Tensor] = decode
) -> Iterator[Callable[..., Any]]:
    """Make one call of the pipeline differentiable; everything is as before on exit.

    Yields the pipeline's own call without its `torch.no_grad`. `decode` takes the place of `chopgrad_align.decode`.

    Raises:
        UsageError: Policies of another kind, modules with hooks that offload, cache or cast, a rollout inside another
            of the same pipeline, a pipeline without a known denoiser, or one that took more or fewer steps than it
            announced.
    """
    expect_policy("rollout", backprop)
    if not isinstance(steps, LastSteps):
        raise UsageError(f"rollout: steps={steps!r}: expected a policy, such as LastSteps(1)")
    denoisers = _denoisers(pipe)
    _refuse_hooks(pipe, {**denoisers, "vae": pipe.vae})
    if torch.is_inference_mode_enabled():
        raise UsageError(
            "rollout: tensors made in torch.inference_mode() have no gradient; leave it, or use torch.no_grad()"
        )

    scheduler, wanted, calls = pipe.scheduler, torch.is_grad_enabled(), 0

    def announced() -> int:
        # The length of the pipeline's loop, which is less than the scheduler's when it starts from a video.
        return getattr(pipe, "num_timesteps", None) or len(scheduler.timesteps)

    def switch_on_when_due() -> None:
        # Solvers of order two take two calls in a step, but only one in the last.
        first = steps.first(math.ceil(announced() / scheduler.order))
        if wanted and calls // scheduler.order >= first and not torch.is_grad_enabled():
            # For the rest of the pipeline's own code too, as guidance. No latents need to be detached: those before
            # this moment never had a graph.
            torch.set_grad_enabled(True)
            # Older autocast would use the weights again that it cast without a graph (pytorch issue 65766).
            torch.clear_autocast_cache()

    def step(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result = original(self, *args, **kwargs)
        if self is scheduler:  # and not a copy that the pipeline made, as for sound
            calls += 1
            switch_on_when_due()
        return result

    def forward(original: Callable[..., Any], self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if calls >= announced():
            raise UsageError(f"rollout: {type(pipe).__name__} takes more than its {announced()} steps (FreeInit?)")
        switch_on_when_due()
        return _recomputed(original, self, args, kwargs) if torch.is_grad_enabled() else original(self, *args, **kwargs)

    def decode_latents(original: Callable[..., Any], self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        from diffusers.models.autoencoders.vae import DecoderOutput

        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        del given["self"]
        return_dict = given.pop("return_dict", True)
        pixels = decode(self, given.pop("z"), backprop, **given)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(scheduler, "step", step))
        stack.callback(_release, scheduler)
        stack.enter_context(_replaced(pipe.vae, "decode", decode_latents))
        # The same clamp with the policy's gradient: the pipeline's own would stop what the decoder's let through.
        denormalize = functools.partial(denormalized, clamp=backprop.clamp(0.0, 1.0))
        stack.enter_context(mock.patch.object(pipe.video_processor, "denormalize", denormalize))
        for denoiser in denoisers.values():
            stack.enter_context(_replaced(denoiser, "forward", forward))
        stack.enter_context(torch.no_grad())  # also restores the caller's mode after `switch_on_when_due`
        yield functools.partial(inspect.unwrap(type(pipe).__call__), pipe)
        if calls != announced():
            raise UsageError(
                f"rollout: {type(pipe).__name__} announced {announced()} scheduler steps and took {calls}, so that "
                "gradient did not begin where it should; do not interrupt the call"
            )


def _denoisers(pipe: Any) -> dict[str, Any]:
    found = {name: pipe.components[name] for name in DENOISERS if pipe.components.get(name) is not None}
    if not found:
        raise UsageError(f"rollout: {type(pipe).__name__} has none of the components {', '.join(DENOISERS)}")
    return found


def _refuse_hooks(pipe: Any, modules: Mapping[str, nn.Module]) -> None:
    """A hook that moves, casts or skips layers would act again, otherwise, when the backward pass runs them again."""
    weights = (weight for module in modules.values() for weight in module.parameters())
    if getattr(pipe, "_all_hooks", None) or any(weight.device.type == "meta" for weight in weights):
        raise UsageError(
            "rollout: the pipeline offloads its modules to the CPU, but the backward pass needs them on the device; "
            "load it without offloading; to save memory, encode prompts once and pass prompt_embeds"
        )
    for name, module in modules.items():
        registries = (getattr(submodule, "_diffusers_hook", None) for submodule in module.modules())
        hooks = {hook for registry in registries if registry is not None for hook in registry.hooks}
        if harmful := sorted(hook for hook in hooks if not hook.startswith("cp_")):  # context parallelism is exact
            raise UsageError(
                f"rollout: pipe.{name} has the diffusers hooks {', '.join(harmful)}, but the backward pass must find "
                "its layers as the forward pass left them: disable caches, group offloading and layerwise casting"
            )


@contextlib.contextmanager
def _replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Within the context `owner.name(...)` is `method(original, owner, ...)`, for this object alone."""
    before = vars(owner).get(name)
    if before is not None and name != "forward":  # hooks of other libraries do replace `forward`
        raise UsageError(
            f"rollout: {type(owner).__name__}.{name} is replaced already, by a rollout under way or by other code"
        )
    bound = getattr(owner, name)
    original = bound.__func__ if before is None else lambda self, *args, **kwargs: bound(*args, **kwargs)

    # A bound method, so that a deep copy of the owner calls it with the copy; and with the class's own signature, in
    # which pipelines look for arguments.
    @functools.wraps(getattr(type(owner), name))
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(original, self, *args, **kwargs)

    vars(owner)[name] = types.MethodType(replacement, owner)
    try:
        yield
    finally:
        if before is None:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before


def _recomputed(original: Callable[..., Any], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call the denoiser so that its backward pass runs it again, with the same random and autocast state."""

    def run(*values: Any) -> Any:
        named = dict(zip(kwargs, values[len(args) :], strict=True))
        return original(module, *values[: len(args)], **named)

    def check(gradient: Tensor) -> None:
        if versions(module) != seen:
            raise UsageError(
                f"the weights of {type(module).__name__} changed, or its mode, between rollout and backward: the "
                "gradient would be wrong: call backward before the optimizer's step"
            )

    seen = versions(module)
    # By position: checkpoint keeps the random state of those devices only that it finds among positional arguments.
    result = checkpoint(run, *args, *kwargs.values(), use_reentrant=False, preserve_rng_state=True)
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            # In a hook of its own: an error inside the recomputation leaves a graph that crashes Python as it exits.
            leaf.register_hook(check)
    return result


def _release(scheduler: Any) -> None:
    """Multistep solvers hold the model's last outputs; with their graph they would keep a whole rollout alive."""
    for name, value in vars(scheduler).items():
        vars(scheduler)[name] = tree_map_only(Tensor, Tensor.detach, value)

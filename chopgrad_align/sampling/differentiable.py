"""Any diffusers video pipeline, differentiable, by its own code.

The pipeline runs its own `__call__`, taken from under its `torch.no_grad`, with methods of its components replaced for
the time of the call. The scheduler's tell where in a sampling loop it is, so that gradient begins where the sampling
policy says; the denoiser's `forward` is run again in the backward pass instead of keeping its activations; `vae.decode`
becomes `chopgrad_align.decode`. What `vae.encode` returns is a constant. Guidance, conditioning, de-normalisation and
post-processing stay the pipeline's.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..common.errors import UsageError
from ..decoding.backprop import Backprop, expect_policy
from ..decoding.clamp import denormalized
from ..decoding.decode import decode
from .denoisers import denoisers_of, refuse_hooks
from .gradient_steps import GradientSteps
from .method_replacement import replaced
from .postprocessing import differentiable_postprocessing
from .recomputation import recomputed
from .steps import StepPolicy, expect_step_policy


class Sampling(Protocol):
    """The denoising steps of one call of a pipeline: what takes the place of its scheduler's and denoisers' methods."""

    @property
    def steps(self) -> GradientSteps: ...

    def step(self, original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the place of `scheduler.step`."""
        ...

    def forward(self, original: Callable[..., Any], denoiser: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Take the place of `denoiser.forward`."""
        ...


@contextlib.contextmanager
def differentiable(
    pipe: Any, steps: StepPolicy, backprop: Backprop, decode: Callable[..., Tensor] = decode, seed: int = 0
) -> Iterator[Callable[..., Any]]:
    """Make one call of the pipeline differentiable; everything is as before on exit.

    Yields the pipeline's own call without its `torch.no_grad`. `decode` takes the place of `chopgrad_align.decode`.
    Of a rollout in several parts it is the first; see `rollout_parts`.

    Raises:
        UsageError: As `performed`, and for what is not a sampling policy.
    """
    expect_step_policy(steps)
    with performed(pipe, GradientSteps(pipe, steps, seed), backprop, decode) as call:
        yield call


@contextlib.contextmanager
def performed(
    pipe: Any, sampling: Sampling, backprop: Backprop, decode: Callable[..., Tensor], audio: bool = False
) -> Iterator[Callable[..., Any]]:
    """Within the context one call of the pipeline, which is yielded, takes its denoising steps as `sampling` does.

    Sound has a gradient if `audio` says so.

    Raises:
        UsageError: A decoding policy of another kind, modules with hooks that offload, cache or cast, a rollout inside
            another of the same pipeline, a pipeline without a known denoiser, a sampling policy that the pipeline's
            number of steps does not fit, or a pipeline that took more or fewer steps than it announced.
    """
    expect_policy("rollout", backprop)
    denoisers = denoisers_of(pipe)
    refuse_hooks(pipe, {**denoisers, "vae": pipe.vae})
    if torch.is_inference_mode_enabled():
        raise UsageError(
            "rollout: tensors made in torch.inference_mode() have no gradient; leave it, or use torch.no_grad()"
        )
    with contextlib.ExitStack() as stack:
        steps = sampling.steps
        stack.enter_context(replaced(pipe.scheduler, "set_timesteps", steps.begin))
        stack.enter_context(replaced(pipe.scheduler, "step", sampling.step))
        stack.callback(_release, pipe.scheduler)
        stack.enter_context(replaced(pipe, "progress_bar", steps.loop.progress_bar))
        for denoiser in denoisers.values():
            stack.enter_context(replaced(denoiser, "forward", sampling.forward))
            if hasattr(denoiser, "cache_context"):
                stack.enter_context(replaced(denoiser, "cache_context", steps.branches.cache_context))
        stack.enter_context(_decoded_by(pipe, decode, backprop))
        stack.enter_context(differentiable_postprocessing(pipe))
        for module, method in _SOUND:
            if pipe.components.get(module) is not None:
                stack.enter_context(replaced(pipe.components[module], method, _recomputed if audio else _constant))
        stack.enter_context(torch.no_grad())  # also restores the caller's mode after `sampling` switched it on
        yield functools.partial(inspect.unwrap(type(pipe).__call__), pipe)
        steps.expect_end()


@contextlib.contextmanager
def _decoded_by(pipe: Any, decode: Callable[..., Tensor], backprop: Backprop) -> Iterator[None]:
    """Within the context `pipe.vae.decode` is `decode` by a policy."""

    def decode_latents(original: Callable[..., Any], vae: nn.Module, *args: Any, **kwargs: Any) -> Any:
        from diffusers.models.autoencoders.vae import DecoderOutput

        given = inspect.signature(original).bind(vae, *args, **kwargs).arguments
        del given["self"]
        return_dict = given.pop("return_dict", True)
        pixels = decode(vae, given.pop("z"), backprop, **given)
        if type(pixels) is Tensor:
            pixels = pixels.as_subclass(_Attached)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    # The same clamp with the policy's gradient: the pipeline's own would stop what the decoder's let through.
    denormalize = functools.partial(denormalized, clamp=backprop.clamp(0.0, 1.0))
    with (
        replaced(pipe.vae, "decode", decode_latents),
        replaced(pipe.vae, "encode", _constant),
        mock.patch.object(pipe.video_processor, "denormalize", denormalize),
    ):
        yield


class _Attached(Tensor):
    """Pixels that stay in the graph when a pipeline detaches them; what is made of them are common tensors.

    Cosmos Transfer detaches what it decodes, section by section. `encode` makes a constant of it for the next section.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def detach(self) -> Tensor:
        return self


_SOUND = (("audio_vae", "decode"), ("vocoder", "forward"), ("sound_tokenizer", "decode"))
"""Components that make sound of latents, and how they are called."""


def _constant(original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return original(module, *args, **kwargs)


def _recomputed(original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return recomputed(original, module, args, kwargs)


def _release(scheduler: Any) -> None:
    """Detach what the scheduler keeps.

    Multistep solvers hold the model's last outputs; with their graph they would keep a whole rollout alive.
    """
    for name, value in vars(scheduler).items():
        vars(scheduler)[name] = tree_map_only(Tensor, Tensor.detach, value)

"""What pipelines do to decoded pixels outside of autograd, with the gradient of what goes into it.

The safety checkers of Cosmos take frames as 8-bit numpy arrays, and return what they let pass, perhaps blurred in part.
A rollout returns that, bit for bit; its gradient is that of the frames that were given to the checker, as if it had
changed nothing (straight-through).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .method_replacement import replaced

_NORMALIZE = "adaptive_mean_std_normalization"  # of Kandinsky 5, which then writes into the tensor of the reference


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, returned: Tensor) -> Tensor:
        ctx.like = given.new_empty(0)
        return returned.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.like), None


@contextmanager
def differentiable_postprocessing(pipe: Any) -> Iterator[None]:
    """Within the context, one call of the pipeline gives frames whose gradient passes safety checkers."""
    given: Tensor | None = None

    def postprocess_video(
        original: Callable[..., Any], processor: Any, video: Tensor, output_type: str = "np", **kwargs: Any
    ) -> Any:
        nonlocal given
        if output_type == "np" and video.requires_grad:
            given = original(processor, video, "pt", **kwargs)
            return original(processor, Tensor.detach(video), "np", **kwargs)
        made = original(processor, video, output_type, **kwargs)
        return made if given is None else _StraightThrough.apply(given, made)

    def check_frames(original: Callable[..., Any], pipe: Any, video: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _StraightThrough.apply(video, original(pipe, Tensor.detach(video), *args, **kwargs))

    def decode_tiles(original: Callable[..., Any], pipe: Any, *args: Any, **kwargs: Any) -> Any:
        return inspect.unwrap(original)(pipe, *args, **kwargs)  # from under its `torch.no_grad`

    with ExitStack() as stack:
        stack.enter_context(replaced(pipe.video_processor, "postprocess_video", postprocess_video))
        for name, method in (("_apply_video_safety_check", check_frames), ("vae_decode_tiled", decode_tiles)):
            if hasattr(pipe, name):
                stack.enter_context(replaced(pipe, name, method))
        if (normalized := getattr(pipe, _NORMALIZE, None)) is not None:
            on_a_copy = lambda source, reference: normalized(source, reference.clone())  # noqa: E731
            stack.enter_context(mock.patch.object(pipe, _NORMALIZE, on_a_copy))
        yield

"""The noise that a pipeline's sampler starts from, made otherwise.

diffusers pipelines draw it in `prepare_latents`, by the function `randn_tensor` of their module. For the time of a call
that function is replaced there, so that shapes, scaling, and what else the method makes stay the pipeline's own.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from unittest import mock

from torch import Tensor

from ..common.errors import UsageError
from .method_replacement import replaced

_DRAW = "randn_tensor"


@runtime_checkable
class Noise(Protocol):
    """A way to make initial noise: a small object; one of your own needs this call and no base class."""

    def __call__(self, noise: Tensor, generator: Any, frame_axis: int) -> Tensor:
        """The noise to start from, of the shape, type and device of the usual one.

        Args:
            noise: The usual one, `(B, C, F, H, W)` in the pipeline's own layout, standard normal.
            generator: Of the call, one for each video in a list, or one for a single video; draw from these alone.
            frame_axis: 1 or 2, where F is.
        """
        ...


@dataclass(frozen=True)
class OffsetNoise:
    """A random constant added to each channel of each video, which lets brightness move as a whole.

    Args:
        scale: Standard deviation of the constant; 0.1 is usual.
    """

    scale: float = 0.1

    def __call__(self, noise: Tensor, generator: Any, frame_axis: int) -> Tensor:
        """`noise + scale · randn(B, C)`, drawn after the noise."""
        from diffusers.utils.torch_utils import randn_tensor

        shape = tuple(size if axis in (0, 3 - frame_axis) else 1 for axis, size in enumerate(noise.shape))
        return noise + self.scale * randn_tensor(shape, generator=generator, device=noise.device, dtype=noise.dtype)


@contextmanager
def starting_from(pipe: Any, make: Noise, frame_axis: int) -> Iterator[None]:
    """Within the context, calls of the pipeline start from what is made of their noise.

    Raises:
        UsageError: The pipeline draws its noise in another way, or `make` returns another shape.
    """
    method = inspect.unwrap(getattr(type(pipe), "prepare_latents", lambda: None))
    module = sys.modules[method.__module__]
    if not hasattr(module, _DRAW):
        raise UsageError(f"model.noise: it is not known how {type(pipe).__name__} draws its noise; leave it out")

    def prepare_latents(original: Callable[..., Any], pipe: Any, *args: Any, **kwargs: Any) -> Any:
        draw, drawn = getattr(module, _DRAW), False

        def draw_and_make(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal drawn
            drawn, noise = True, draw(*args, **kwargs)
            made = make(noise, inspect.signature(draw).bind(*args, **kwargs).arguments.get("generator"), frame_axis)
            if made.shape != noise.shape:
                raise UsageError(f"model.noise: expected a shape of {tuple(noise.shape)}, got {tuple(made.shape)}")
            return made.to(noise)

        with mock.patch.object(module, _DRAW, draw_and_make):
            prepared = original(pipe, *args, **kwargs)
        if not drawn:
            raise UsageError(f"model.noise: this call of {type(pipe).__name__} draws no initial noise; leave it out")
        return prepared

    with replaced(pipe, "prepare_latents", prepare_latents):
        yield

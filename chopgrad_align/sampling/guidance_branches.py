"""The two predictions of classifier-free guidance (arXiv 2207.12598), told apart while a pipeline runs.

diffusers pipelines call the denoiser in one of two ways. Either twice, inside `denoiser.cache_context("cond")` and
`("uncond")`, which name the calls; or once, on a batch of twice the size whose first half is the unconditional one.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..common.errors import UsageError

_UNCONDITIONAL = ("uncond", "pred_uncond")  # of pipelines, of their guiders


class GuidanceBranches:
    """Make constants of the unconditional predictions of one rollout."""

    def __init__(self) -> None:
        self._named: str | None = None
        self._outputs: list[Tensor] = []

    @contextlib.contextmanager
    def cache_context(
        self, original: Callable[..., Any], denoiser: Any, name: str, *args: Any, **kwargs: Any
    ) -> Iterator[None]:
        """Take the place of the denoiser's own method, and remember the name of the call."""
        self._named = name
        try:
            with original(denoiser, name, *args, **kwargs):
                yield
        finally:
            self._named = None

    @property
    def unconditional(self) -> bool:
        """True while the denoiser is called for the unconditional prediction alone."""
        return self._named in _UNCONDITIONAL

    def predicted(self, output: Any) -> None:
        """Note what the denoiser returned otherwise."""
        self._outputs.append(tree_leaves(output)[0])

    def detach(self, scheduler: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Cut the unconditional half of what was noted off the graph, before a step of the scheduler.

        Raises:
            UsageError: The denoiser was called several times, and no names tell for what.
        """
        given = inspect.signature(type(scheduler).step).bind(scheduler, *args, **kwargs).arguments
        batch, outputs = len(given["sample"]), self._outputs
        self._outputs = []
        sizes = [len(output) for output in outputs]
        if sizes == [2 * batch]:
            if outputs[0].requires_grad:
                # In the backward pass, since the pipeline has split the prediction already.
                outputs[0].register_hook(
                    lambda gradient: torch.cat([torch.zeros_like(gradient[:batch]), gradient[batch:]])
                )
        elif sizes not in ([batch], []):
            raise UsageError(
                f"rollout: unconditional=False: the denoiser was called for {', '.join(map(str, sizes))} clips in a "
                f"step for {batch}, and nothing says which of them are the unconditional ones of guidance; use "
                "unconditional=True"
            )

"""The protocol of witnesses: measures of held-out videos that nothing is trained on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...objective.reward import Samples
from ...objective.reward.samples import declares_sample
from .bounds import Bounds

_LUMA = (0.299, 0.587, 0.114)  # Rec. 601


class Witness(ABC):
    """A measure of videos that tells whether a reward rose at the cost of something else.

    It observes the videos a few at a time and keeps something small of each; the values of all follow from that. A
    measure of single videos needs `observe` alone. If that has a further argument `sample: Samples | None = None`, it
    is given what else is known of the samples.

    Attributes:
        bounds: Where the guard expects the mean relative to the base model's, if nobody says otherwise.
        reads_base: Whether `values` compares with what was kept of the base model's videos.
        reads_sample: Whether it is given what else is known of the samples.
        reads_audio: Whether it reads the sound in there.
        module: Network whose weights are on the device while it observes, if there is one.
    """

    bounds: ClassVar[Bounds | None] = None
    reads_base: ClassVar[bool] = False

    @property
    def reads_sample(self) -> bool:
        """See the class."""
        return declares_sample(self.observe)

    @property
    def reads_audio(self) -> bool:
        """See the class."""
        return False

    @property
    def module(self) -> nn.Module | None:
        """See the class."""
        return None

    @abstractmethod
    def observe(self, video: Tensor, prompts: list[str], seeds: Sequence[int]) -> Tensor:
        """Keep something of each video: `(B, F, 3, H, W)` in [0, 1] -> `(B, ...)`; for most witnesses the value `(B,)`.

        Args:
            video: On any device, of any floating-point type.
            prompts: One a sample.
            seeds: One a sample, for random choices.
        """

    def values(self, kept: Sequence[Tensor], base: Sequence[Tensor], groups: Sequence[int]) -> list[float]:
        """The value of each held-out pair; NaN where it has none. Default: what was kept is the value.

        Args:
            kept: What `observe` returned for each pair, on the CPU.
            base: The same of the base model, if `reads_base`.
            groups: Equal for pairs that differ in the seed alone.
        """
        return [item.item() for item in kept]


def observe(
    witness: Witness, video: Tensor, prompts: list[str], seeds: Sequence[int], sample: Samples | None = None
) -> Tensor:
    """`witness.observe(video, prompts, seeds)`, with what else is known if it asks for it."""
    call: Any = witness.observe
    return call(video, prompts, seeds, **({"sample": sample} if declares_sample(call) else {}))


@contextmanager
def on_device(witnesses: Mapping[str, Witness], device: torch.device) -> Iterator[None]:
    """A block in which networks of witnesses are on a device; after it they are on the CPU.

    Training needs the memory, and is most of the time. What a reward keeps of prompts stays where it was computed, so
    that a witness observes on one device only.
    """
    modules = [witness.module for witness in witnesses.values() if witness.module is not None]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module in modules:
            module.to("cpu")


def luma(video: Tensor) -> Tensor:
    """Brightness of pixels by Rec. 601: `(..., 3, H, W)` in [0, 1] -> `(..., H, W)` in [0, 1], float32."""
    video = video.float()
    return (video * video.new_tensor(_LUMA).view(3, 1, 1)).sum(-3)

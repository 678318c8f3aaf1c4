"""Everything that is known of a sample beside its pixels and its prompt."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...common.errors import UsageError


@dataclass(frozen=True)
class Samples:
    """Everything that is known of the videos of a batch beside their pixels and prompts.

    Each sequence has one entry a sample, in the order of the batch; one that is left out is not known of any.

    Attributes:
        count: Samples of the batch, B.
        fps: Frames a second; None where they are not known.
        images: First image of which the video is made, `(3, H, W)` in [0, 1], of its own size; None where there is
            none.
        videos: For each role of the data, such as `target`, `degraded`, `mask` or the argument of the pipeline's call
            that it is, a video a sample, `(F, C, H, W)` in [0, 1].
        audio: Sound, `(channels, n)` in [-1, 1], with its gradient if it was made with the video; None where there is
            none.
        audio_rate: Values a second of the sound.
        rows: Columns of the row of the data that the sample is of, by name, as the file has them.

    Raises:
        UsageError: A sequence has another number of entries.
    """

    count: int
    fps: Sequence[float | None] = ()
    images: Sequence[Tensor | None] = ()
    videos: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    audio: Sequence[Tensor | None] = ()
    audio_rate: float | None = None
    rows: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        for name, unknown in (("fps", None), ("images", None), ("audio", None), ("rows", {})):
            given: tuple[Any, ...] = tuple(getattr(self, name)) or (unknown,) * self.count
            self._expect_one_each(name, given)
            object.__setattr__(self, name, given)
        videos = {role: tuple(of) for role, of in self.videos.items()}
        for role, of in videos.items():
            self._expect_one_each(f"videos[{role!r}]", of)
        object.__setattr__(self, "videos", videos)

    def _expect_one_each(self, name: str, given: Sequence[Any]) -> None:
        if len(given) != self.count:
            raise UsageError(f"Samples: {name} has {len(given)} entries, expected one for each of {self.count} samples")

    def __len__(self) -> int:
        return self.count

    def take(self, places: Iterable[int]) -> Samples:
        """The samples at these places, in this order; one may come several times."""
        order = [*places]
        taken: dict[str, Any] = {
            f.name: [getattr(self, f.name)[b] for b in order] for f in fields(self) if f.name in _PER_SAMPLE
        }
        videos = {role: [of[b] for b in order] for role, of in self.videos.items()}
        return replace(self, count=len(order), videos=videos, **taken)

    def choose_frames(self, frames: Sequence[Sequence[int]], total: int) -> Samples:
        """These frames of each sample, where a video has `total` frames, as long as the one that is scored."""
        videos = {
            role: [v[list(chosen)] if len(v) == total else v for v, chosen in zip(of, frames, strict=True)]
            for role, of in self.videos.items()
        }
        return replace(self, videos=videos)

    def as_frames(self, total: int) -> Samples:
        """Each of the `total` frames of each sample as a sample of its own, sample by sample; nothing is copied.

        Of a video of that length it has the frame, `(1, C, H, W)`, of any other all of it.
        """
        places = [b for b in range(self.count) for _ in range(total)]
        videos = {
            role: [v[t : t + 1] if len(v) == total else v for v in of for t in range(total)]
            for role, of in self.videos.items()
        }
        return replace(replace(self, videos={}).take(places), videos=videos)

    def to(self, device: torch.device) -> Samples:
        """The same, with pictures, videos and sound on a device."""

        def moved(tensors: Sequence[Any]) -> list[Any]:
            return [tensor if tensor is None else tensor.to(device) for tensor in tensors]

        videos = {role: moved(of) for role, of in self.videos.items()}
        return replace(self, images=moved(self.images), audio=moved(self.audio), videos=videos)


_PER_SAMPLE = ("fps", "images", "audio", "rows")


def declares_sample(function: Callable[..., Any]) -> bool:
    """True if a function has the argument `sample: Samples | None = None`.

    Raises:
        UsageError: It has an argument `sample` of another type, or one that must be given.
    """
    try:
        parameter = inspect.signature(function).parameters.get("sample")
    except (TypeError, ValueError):  # of a callable that tells nobody its arguments
        return False
    if parameter is None:
        return False
    # By its words: what a module imports for type checkers alone cannot be resolved.
    if not re.search(r"\bSamples\b", str(parameter.annotation)) or parameter.default is not None:
        name = getattr(function, "__qualname__", type(function).__name__)
        raise UsageError(
            f"{name}: the argument `sample` is how a reward or loss asks for all that is known of its samples: write "
            "`sample: Samples | None = None`, or call it something else"
        )
    return True

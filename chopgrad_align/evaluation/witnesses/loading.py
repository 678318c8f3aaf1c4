"""Witnesses by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...common.errors import UsageError
from ...common.loading import construct, failing_as_usage_error
from ...objective.reward import Samples, load_reward
from ...objective.reward.protocol import at_fps
from .contrast import Contrast
from .distance import Distance
from .diversity import Diversity
from .flicker import Flicker
from .flow import Flow
from .motion import Motion
from .protocol import Witness, observe, on_device
from .reward import RewardWitness
from .saturation import Saturation
from .sharpness import Sharpness

BUILT_IN: Mapping[str, type[Witness]] = {
    "motion": Motion,
    "flow": Flow,
    "flicker": Flicker,
    "saturation": Saturation,
    "contrast": Contrast,
    "sharpness": Sharpness,
    "diversity": Diversity,
    "distance": Distance,
}
"""Those of every run, unless it leaves them out.

Their bounds leave room for what the embedded run does when it is not overdone: after 45 steps with a frame-wise reward
motion was 1.01 to 1.68 times the base model's, by class of motion, and saturation 1.02 to 1.24 times; after 150 steps
objects that should grow or bounce had lost 0.16 to 0.24 of their motion, which is where motion's lower bound lies.
"""


def check_witnesses(
    witnesses: Mapping[str, Witness],
    prompts: list[str],
    frames: int,
    size: tuple[int, int],
    device: torch.device,
    sample: Samples | None = None,
) -> None:
    """Let witnesses that are not built in observe a small random video on a device.

    Raises:
        UsageError: One fails, or does not return a tensor with an entry for each video.
    """
    own = {name: witness for name, witness in witnesses.items() if type(witness) not in BUILT_IN.values()}
    video = torch.rand((len(prompts), frames, 3, *size), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad(), on_device(own, device):
        for name, witness in own.items():
            with failing_as_usage_error(f"witnesses.{name}, on a video {tuple(video.shape)},"):
                kept: Any = observe(witness, video, prompts, range(len(prompts)), sample)
            if not isinstance(kept, Tensor) or kept.shape[:1] != (len(prompts),):
                what = tuple(kept.shape) if isinstance(kept, Tensor) else type(kept).__name__
                raise UsageError(
                    f"witnesses.{name}: expected a tensor with an entry for each of {len(prompts)} videos, got {what}"
                )


def load_witness(key: str, name: str, args: Mapping[str, Any], fps: float | None = None) -> Witness:
    """Construct a witness of one's own, or make one of a reward.

    Args:
        key: What the run calls it.
        name: A published reward, or the class of a witness or of a reward: `package.module:Class` or
            `path/to/file.py:Class`.
        args: Given to it by keyword.
        fps: Frames a second of the videos, for rewards that depend on them.

    Raises:
        UsageError: As `load_reward`.
    """
    made: Any = construct("witness", name, name, dict(args)) if ":" in name else load_reward(name, **args)
    if isinstance(made, Witness):
        return made
    if not callable(made):
        raise UsageError(f"witnesses.{key}: {name!r} made a {type(made).__name__}, which is neither witness nor reward")
    return RewardWitness(made if fps is None else at_fps(made, fps), key)

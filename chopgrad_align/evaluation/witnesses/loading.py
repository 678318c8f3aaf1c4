"""Witnesses by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...common.errors import UsageError
from ...common.loading import construct
from ...objective.reward import load_reward
from .contrast import Contrast
from .distance import Distance
from .diversity import Diversity
from .flicker import Flicker
from .flow import Flow
from .motion import Motion
from .protocol import Witness
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
"""Those of every run, unless it leaves them out."""


def load_witness(key: str, name: str, args: Mapping[str, Any]) -> Witness:
    """Construct a witness of one's own, or make one of a reward.

    Args:
        key: What the run calls it.
        name: A published reward, or the class of a witness or of a reward: `package.module:Class` or
            `path/to/file.py:Class`.
        args: Given to it by keyword.

    Raises:
        UsageError: As `load_reward`.
    """
    made: Any = construct("witness", name, name, dict(args)) if ":" in name else load_reward(name, **args)
    if isinstance(made, Witness):
        return made
    if not callable(made):
        raise UsageError(f"witnesses.{key}: {name!r} made a {type(made).__name__}, which is neither witness nor reward")
    return RewardWitness(made, key)

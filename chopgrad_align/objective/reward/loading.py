"""Rewards by name: published ones, those of an installed package, and those in a user's own file."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TypeVar

import torch
from torch import nn

from ...common.errors import UsageError, located
from ...common.loading import construct, unknown_name
from .protocol import Reward, reads_sample

_Scorer = TypeVar("_Scorer")

ENTRY_POINTS = "chopgrad_align.rewards"


def load_reward(name: str, /, **args: object) -> Reward:
    """Construct a reward from its name in a config.

        load_reward("hps_v2", version="v2.1")
        load_reward("my_package.rewards:Sharpness", radius=2)
        load_reward("rewards/sharpness.py:Sharpness")          # relative to the current directory

    Args:
        name: A published name (entry point group `chopgrad_align.rewards`), `package.module:Class`, or
            `path/to/file.py:Class`. Instead of a class, any callable that returns a reward.
        args: Given to it by keyword.

    Returns:
        The reward; a `nn.Module` has its weights frozen, is in eval mode and still on the CPU.

    Raises:
        UsageError: The name, module, file, attribute or an argument is wrong, a package is not installed, or the reward
            has an argument `sample` that is none of `Samples`.
    """
    location = name if ":" in name else _published(name)
    reward = construct("reward", name, location, args)
    if not callable(reward):
        raise UsageError(
            f"reward {name!r} made a {type(reward).__name__}, which cannot be called as reward(video, prompts)"
        )
    with located(f"reward {name!r}"):
        reads_sample(reward)
    return reward


def to_device(reward: _Scorer, device: torch.device) -> _Scorer:
    """The reward (or loss) with its weights on the device; one that is no module looks after itself."""
    return reward.to(device) if isinstance(reward, nn.Module) else reward


def _published(name: str) -> str:
    """`module:Class` of an entry point."""
    known: dict[str, set[str]] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        known.setdefault(entry.name, set()).add(entry.value)
    if name not in known:
        raise unknown_name("reward", name, known)
    if len(known[name]) > 1:
        raise UsageError(f"several packages publish a reward {name!r}: choose {' or '.join(sorted(known[name]))}")
    return known[name].pop()

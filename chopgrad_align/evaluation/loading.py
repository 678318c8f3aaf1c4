"""A reward from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..common.errors import UsageError
from ..objective.reward import Reward, load_reward
from ..objective.reward.loading import to_device


def reward_on_device(name: str, arguments: Sequence[str], device: str | None) -> tuple[Reward, torch.device]:
    """Load a reward with arguments `key=value`, values as in a config; default device: a GPU if there is one.

    Raises:
        UsageError: As `load_reward`; an argument that cannot be read.
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        try:
            if "=" not in argument or argument.startswith("="):
                raise ValueError("write key=value")
            read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([argument]), resolve=True)
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"cannot read the argument {argument!r} of {name}: {reason}") from error
        values |= read
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return to_device(load_reward(name, **values), where), where

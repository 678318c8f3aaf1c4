"""The optimizer of a run and its learning rate, by the names of the libraries that have them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..common.errors import UsageError
from ..common.loading import construct, unknown_name
from .config import Named, Train

_OF_A_MEASURE = ("reduce_lr_on_plateau", "greedy")  # which change the rate by what is measured


def make_optimizer(parameters: list[nn.Parameter], train: Train) -> torch.optim.Optimizer:
    """The optimizer of a config; default AdamW.

    Raises:
        UsageError: One that cannot be loaded, or refuses its arguments or the trained weights.
    """
    if train.optimizer is None:
        return torch.optim.AdamW(parameters, lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay)
    made = _constructed("optimizer", train.optimizer, params=parameters, lr=train.learning_rate)
    if not isinstance(made, torch.optim.Optimizer):
        raise UsageError(
            f"train.optimizer.name: {train.optimizer.name} made a {type(made).__name__}, expected an optimizer of torch"
        )
    _set_mode(made, "train")
    return made


def make_schedule(optimizer: torch.optim.Optimizer, train: Train) -> LRScheduler:
    """The schedule of a config; default a linear rise over the first `warmup_steps` steps, then the whole rate.

    Raises:
        UsageError: One that cannot be loaded, or refuses its arguments.
    """
    if train.schedule is None:
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, train.warmup_steps)))
    name = train.schedule.name
    if "." in name:
        if train.warmup_steps:
            raise UsageError(
                f"train.warmup_steps: {name} has none; chain schedules in a function of yours, path/to/file.py:function"
            )
        made = _constructed("schedule", train.schedule, optimizer=optimizer)
        if not isinstance(made, LRScheduler):
            raise UsageError(f"train.schedule.name: {name} made a {type(made).__name__}, expected an LRScheduler")
        return made
    from transformers import SchedulerType, get_scheduler

    known = [kind.value for kind in SchedulerType if kind.value not in _OF_A_MEASURE]
    if name not in known:
        raise unknown_name("schedule", name, known)
    try:
        return get_scheduler(name, optimizer, train.warmup_steps, train.steps, dict(train.schedule.args) or None)
    except (TypeError, ValueError) as error:
        raise UsageError(f"train.schedule {name!r}: {error}") from error


@contextmanager
def at_average(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the context the weights are those that the optimizer has found, of which schedule-free ones train others
    (arXiv 2405.15682); for the others nothing changes."""
    _set_mode(optimizer, "eval")
    try:
        yield
    finally:
        _set_mode(optimizer, "train")


def has_average(optimizer: torch.optim.Optimizer) -> bool:
    """True if `at_average` changes the weights."""
    return hasattr(optimizer, "eval")


def _set_mode(optimizer: Any, mode: str) -> None:
    if has_average(optimizer):
        getattr(optimizer, mode)()


def _constructed(kind: str, named: Named, **given: object) -> object:
    """Make a thing by its dotted name, `package.module.Class`, or as `construct` has it."""
    name, location = named.name, named.name
    if ":" not in name:
        if "." not in name or name.endswith(".py"):
            raise UsageError(
                f"train.{kind}.name: expected a dotted name such as torch.optim.AdamW, or path/to/file.py:Class, "
                f"got {name!r}"
            )
        location = ":".join(name.rsplit(".", 1))
    return construct(kind, name, location, named.args, **given)

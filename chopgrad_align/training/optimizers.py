"""The optimizer of a run and its learning rate."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from .config import Train


def make_optimizer(parameters: list[nn.Parameter], train: Train) -> torch.optim.Optimizer:
    """AdamW with the config's settings."""
    return torch.optim.AdamW(parameters, lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay)


def make_schedule(optimizer: torch.optim.Optimizer, train: Train) -> LRScheduler:
    """A linear rise over the first `warmup_steps` steps, then the whole learning rate."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, train.warmup_steps)))

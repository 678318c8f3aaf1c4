"""Versions of a module's weights, to see in the backward pass whether it is what it was in the forward pass."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Versions = list[Any]


def versions(module: nn.Module) -> Versions:
    """A value that is equal at two moments if no weight or buffer changed between them, and no layer its mode.

    A change past autograd's sight, by `weight.data.copy_(...)`, goes unnoticed, and so does one of a frozen weight that
    is sharded among processes: it is another tensor each time it is gathered.
    """
    sharded = _is_sharded(module)
    weights = (weight for weight in module.parameters() if weight.requires_grad or not sharded)
    tensors = (*weights, *module.buffers())
    seen = [(tensor._version, tensor.untyped_storage()._cdata) for tensor in tensors]
    return [*seen, *(part.training for part in module.modules())]


def _is_sharded(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and imported by who shards
    return fsdp is not None and any(isinstance(part, fsdp.FSDPModule) for part in module.modules())


def _count_updates(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    # Fused and foreign kernels write weights without autograd's counting it.
    updated = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    torch.autograd.graph.increment_version(updated)


register_optimizer_step_post_hook(_count_updates)

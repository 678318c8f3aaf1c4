"""The modules of a pipeline that are called in every denoising step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..common.errors import UsageError

DENOISERS = ("transformer", "transformer_2", "unet", "controlnet")
"""Names of the pipeline components that can be denoisers."""


def denoisers_of(pipe: Any) -> dict[str, Any]:
    """The denoisers that a pipeline has, by the names of its components.

    Raises:
        UsageError: It has none.
    """
    found = {name: pipe.components[name] for name in DENOISERS if pipe.components.get(name) is not None}
    if not found:
        raise UsageError(f"rollout: {type(pipe).__name__} has none of the components {', '.join(DENOISERS)}")
    return found


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks of a denoiser: the entries of its module lists."""
    lists = (part for part in denoiser.children() if isinstance(part, nn.ModuleList))
    return [block for blocks in lists for block in blocks]


def refuse_hooks(pipe: Any, modules: Mapping[str, nn.Module]) -> None:
    """Raise a UsageError for hooks that move, cast or skip layers: the recomputation would trigger them once more."""
    weights = (weight for module in modules.values() for weight in module.parameters())
    if getattr(pipe, "_all_hooks", None) or any(weight.device.type == "meta" for weight in weights):
        raise UsageError(
            "rollout: the pipeline offloads its modules to the CPU, but the backward pass needs them on the device; "
            "load it without offloading; to save memory, encode prompts once and pass prompt_embeds"
        )
    for name, module in modules.items():
        registries = (getattr(submodule, "_diffusers_hook", None) for submodule in module.modules())
        hooks = {hook for registry in registries if registry is not None for hook in registry.hooks}
        if harmful := sorted(hook for hook in hooks if not hook.startswith("cp_")):  # context parallelism is exact
            raise UsageError(
                f"rollout: pipe.{name} has the diffusers hooks {', '.join(harmful)}, but the backward pass must find "
                "its layers as the forward pass left them: disable caches, group offloading and layerwise casting"
            )

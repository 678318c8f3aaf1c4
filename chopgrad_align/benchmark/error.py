"""Curve (c): how far a gradient is from the exact one, at the latents and at the weights of a LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..data.procedural import render
from ..decoding.backprop import Backprop, Full
from ..decoding.decode import decode
from ..sampling.rollout import differentiable
from ..sampling.steps import LastSteps
from .cases import Case, fit, losses, scenes_of
from .rows import REFERENCE, Method


def compare(gradient: Tensor, exact: Tensor) -> tuple[float, float]:
    """Cosine to the exact gradient, and relative error |gradient - exact| / |exact|; in float64."""
    gradient, exact = gradient.double().flatten(), exact.double().flatten()
    cosine = torch.dot(gradient, exact) / (gradient.norm() * exact.norm())
    return float(cosine), float((gradient - exact).norm() / exact.norm())


def measure_error(vae: nn.Module, methods: Mapping[str, Method], cases: Iterable[Case]) -> Any:
    """Cosine and relative error of the latents' gradient by each method, in each case."""
    table = _Table(methods)
    for case in cases:
        gradients = {name: method(vae, case.latents, case.loss) for name, method in methods.items()}
        table.add(case.name, gradients)
    return table.result


def measure_lora_error(
    pipe: Any, parameters: list[nn.Parameter], call: Mapping[str, Any], methods: Mapping[str, Method], count: int
) -> Any:
    """The same for the gradient of a LoRA's weights, of a clip that the pipeline samples, for `count` prompts.

    The pipeline samples once a prompt. Its graph ends at the latents, through which the gradient of each method is
    pulled back: that is the gradient of a rollout with this method, since pulling back is linear.
    """
    table = _Table(methods)
    for seed, scene in enumerate(scenes_of(count)):
        latents = sampled_latents(pipe, prompt=scene.caption, generator=torch.Generator().manual_seed(seed), **call)
        size = call["height"], call["width"]
        target = fit(render(scene, seed, call["num_frames"], max(size)), size)
        for kind, loss in losses(target.to(latents)).items():
            gradients = {}
            for name, method in methods.items():
                at_latents = method(pipe.vae, latents, loss)
                weights = torch.autograd.grad(latents, parameters, at_latents, retain_graph=True)
                gradients[name] = torch.cat([weight.flatten() for weight in weights])
            table.add(f"{scene.caption}, {kind}", gradients)
    return table.result


def sampled_latents(pipe: Any, **call: Any) -> Tensor:
    """The latents that the pipeline decodes, with the graph of its last denoising step."""
    found: list[Tensor] = []

    def keep(vae: nn.Module, latents: Tensor, backprop: Backprop, **kwargs: Any) -> Tensor:
        found.append(latents)
        with torch.no_grad():
            return decode(vae, latents, backprop, **kwargs)

    with differentiable(pipe, LastSteps(1), Full(), keep) as sample:
        sample(**call, output_type="pt")
    return found[0]


class _Table:
    """Cosines and relative errors to the reference's gradient: for each method one a case."""

    def __init__(self, methods: Iterable[str]) -> None:
        self.result: dict[str, Any] = {"cases": [], "cosine": {}, "relative_error": {}}
        for name in methods:
            self.result["cosine"][name], self.result["relative_error"][name] = [], []

    def add(self, case: str, gradients: Mapping[str, Tensor]) -> None:
        self.result["cases"].append(case)
        for name, gradient in gradients.items():
            cosine, error = compare(gradient, gradients[REFERENCE])
            self.result["cosine"][name].append(cosine)
            self.result["relative_error"][name].append(error)

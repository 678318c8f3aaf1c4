"""A training loop that can be interrupted, and the weights that it leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from chopgrad_align.common.errors import UsageError
from chopgrad_align.common.files import whole_file


def train(
    name: str,
    work: Path,
    modules: dict[str, nn.Module],
    steps: int,
    learning_rate: float,
    loss_of_step: Callable[[int], tuple[Tensor, dict[str, float]]],
    ema_decay: float = 0.999,
    weight_decay: float = 0.0,
) -> dict[str, dict[str, Tensor]]:
    """Muon for matrices, Adam for the rest; returns the exponential moving average of each module's weights.

    Muon (Jordan and others, 2024) orthogonalises the update of each weight matrix; a convolution counts as the matrix
    (output channels, everything else). On the small autoencoder it needed less than half of Adam's steps.

    `loss_of_step(step)` must be a function of the step alone (its data and noise are seeded by it), so that a resumed
    run continues as if it had never stopped. A checkpoint is written every few minutes and at the end.
    """
    parameters = [p for module in modules.values() for p in module.parameters()]
    matrices = [p for p in parameters if p.dim() >= 2 and min(p.shape[0], p[0].numel()) > 16]
    views = [nn.Parameter(p.detach().view(p.shape[0], -1)) for p in matrices]  # share the storage of the weights
    others = [p for p in parameters if all(p is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(views, lr=learning_rate, weight_decay=weight_decay),
        torch.optim.Adam(others, lr=0.1 * learning_rate, betas=(0.9, 0.99)),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    ema = {n: {k: v.detach().clone() for k, v in m.state_dict().items()} for n, m in modules.items()}
    checkpoint, first = work / f"{name}.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for n, module in modules.items():
            module.load_state_dict(state["modules"][n])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        ema, first = state["ema"], state["step"]

    def save(step: int) -> None:
        state: dict[str, Any] = {"modules": {n: m.state_dict() for n, m in modules.items()}}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        with whole_file(checkpoint) as partial:
            torch.save(state | {"ema": ema, "step": step}, partial)

    saved = time.monotonic()
    averages: dict[str, float] = {}
    for step in (bar := tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=10)):
        torch.manual_seed(step)
        progress = step / steps
        rate = min(1.0, (step + 1) / 50, (1 - progress) / 0.5 + 0.01)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
        loss, metrics = loss_of_step(step)
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for view, matrix in zip(views, matrices, strict=True):
            view.grad = None if matrix.grad is None else matrix.grad.view_as(view)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for n, module in modules.items():
                for k, v in module.state_dict().items():
                    if v.is_floating_point():
                        ema[n][k].lerp_(v, 1 - decay)
        for k, v in {"loss": loss.item(), **metrics}.items():
            averages[k] = v if k not in averages else 0.98 * averages[k] + 0.02 * v
        if step % 50 == 49:
            bar.set_postfix({k: f"{v:.4g}" for k, v in averages.items()})
            with (work / f"{name}.jsonl").open("a") as log:
                log.write(json.dumps({"step": step + 1, "rate": rate, **averages}) + "\n")
        if time.monotonic() - saved > 120:
            save(step + 1)
            saved = time.monotonic()
    if first < steps:
        save(steps)
    return ema


def trained(work: Path, name: str, module: Any, key: str | None = None) -> Any:
    """The module with the averaged weights of its stage."""
    checkpoint = work / f"{name}.pt"
    if not checkpoint.exists():
        raise UsageError(f"{checkpoint} does not exist; run the stage '{name}' first")
    module.load_state_dict(torch.load(checkpoint, weights_only=True)["ema"][key or name])
    return module.eval().requires_grad_(False)

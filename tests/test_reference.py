"""The distance to the untrained model: in float64 its gradient against a sampling loop by hand, and its beginning."""

import copy
from contextlib import nullcontext

import pytest
import tiny_pipelines
import torch
from gradients import relative_error
from peft import LoraConfig
from test_steps import float64, predictor  # noqa: F401 (a fixture for every test here)
from torch import Tensor

from chopgrad_align import Full, LastSteps, Steps
from chopgrad_align.objective.objective import Objective
from chopgrad_align.objective.terms import BaseDistanceTerm
from chopgrad_align.training.methods import DirectGradient, MicroBatch
from chopgrad_align.training.modules import Modules
from chopgrad_align.training.trainable import LoraOnDenoisers

CALL = {**tiny_pipelines.CALLS["wan_t2v"], "num_inference_steps": 3}


def lora(pipe, init=False):
    adapter = LoraConfig(r=2, target_modules=tiny_pipelines.TARGETS, init_lora_weights=init)
    return LoraOnDenoisers(pipe, adapter)


def modules(pipe):
    made = Modules(pipe, [r"transformer\.blocks\.1\.(ffn|attn1)", r"transformer\.proj_out"])
    for weight in made.parameters:
        weight.data += 0.1 * torch.randn_like(weight)
    return made


def accumulated(pipe, trainable, steps, call) -> tuple[Tensor, Tensor]:
    """The distances, and the gradient of twice their sum."""
    objective = Objective({"reference": BaseDistanceTerm(2.0)})
    method = DirectGradient(pipe, call, objective, steps, Full(), 1, lambda name: nullcontext(), base=trainable.base)
    rows = method.accumulate(MicroBatch({}, list(call["prompt"]), [0, 1]), {})
    return rows[:, 1], torch.cat([weight.grad.flatten() for weight in trainable.parameters if weight.grad is not None])


def by_hand(pipe, trainable, chosen, call) -> Tensor:
    """The distances by plain autograd, of both branches of guidance in these steps."""
    predict, scheduler, latents = predictor(pipe, call), pipe.scheduler, call["latents"]
    with trainable.base():
        predict_base = predictor(copy.deepcopy(pipe), call)
    scheduler.set_timesteps(call["num_inference_steps"])
    errors = []
    for i, time in enumerate(scheduler.timesteps):
        ours, theirs = predict(latents, time), predict_base(latents, time)
        if i in chosen:
            errors += [(a - b).square().flatten(1).mean(1) for a, b in zip(ours, theirs, strict=True)]
        guided = ours[0] + call["guidance_scale"] * (ours[1] - ours[0])
        latents = scheduler.step(guided if i in chosen else guided.detach(), time, latents, return_dict=False)[0]
    return torch.stack(errors).mean(0)


@pytest.mark.parametrize("make", [lora, modules], ids=["lora", "modules"])
@pytest.mark.parametrize(
    ("steps", "chosen"),
    [(LastSteps(1), {2}), (LastSteps(3), {0, 1, 2}), (Steps([0, 2]), {0, 2})],
    ids=["one", "all", "two"],
)
def test_gradient_of_a_loop_by_hand(make, steps, chosen):
    pipe = tiny_pipelines.wan_t2v()
    pipe.to(torch.float64)
    trainable = make(pipe)
    call = {**CALL, "latents": torch.randn(2, 4, 2, 4, 4, dtype=torch.float64)}
    distances = by_hand(pipe, trainable, chosen, call)
    expected = torch.autograd.grad(2 * distances.sum(), trainable.parameters, allow_unused=True)
    pipe.transformer.enable_gradient_checkpointing()  # blocks that are recomputed see the untrained weights as well
    ours, gradient = accumulated(pipe, trainable, steps, call)
    assert distances.min() > 1e-6
    torch.testing.assert_close(ours, distances.detach(), rtol=1e-6, atol=0)
    assert relative_error(gradient, torch.cat([g.flatten() for g in expected if g is not None])) < 1e-10


def test_a_new_lora_is_at_no_distance():
    pipe = tiny_pipelines.wan_t2v().to(torch.float64)
    trainable = lora(pipe, init="gaussian")
    distances, gradient = accumulated(pipe, trainable, LastSteps(2), CALL)
    assert not distances.any()
    assert not gradient.any()

"""Stochastic schedulers: their noise is a function of each video's seed, and the gradient is that of this noise."""

import json
from contextlib import nullcontext

import pytest
import tiny_pipelines
import tiny_runs
import torch
from gradients import relative_error
from test_rollout import add_lora, denoiser_of, weights_of
from test_steps import distance, latents_of, predictor
from torch import Tensor

from chopgrad_align import LastSteps, LowVariance, rollout
from chopgrad_align.sampling.last_step import RecordedLastStep
from chopgrad_align.sampling.randomness import seeded
from chopgrad_align.training.run import train
from chopgrad_align.training.schedulers import replaced_scheduler


def with_scheduler(kind, name, **settings):
    pipe = getattr(tiny_pipelines, kind)()
    add_lora(denoiser_of(pipe))
    pipe.scheduler = replaced_scheduler(pipe, {"name": name, **settings}, 4)
    return pipe, {**tiny_pipelines.CALLS[kind], "num_inference_steps": 4}


def of_seeds(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


STOCHASTIC = {
    "flow_euler": ("wan_t2v", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    "flow_lcm": ("wan_t2v", "FlowMatchLCMScheduler", {}),
    "flow_sde": ("wan_t2v", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "ancestral": ("cogvideox", "EulerAncestralDiscreteScheduler", {}),
    "cogvideox_dpm": ("cogvideox", "CogVideoXDPMScheduler", {}),
    "sa": ("cogvideox", "SASolverScheduler", {}),
    "ddpm": ("animatediff", "DDPMScheduler", {}),
    "lcm": ("animatediff", "LCMScheduler", {}),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
@pytest.mark.parametrize("kind", STOCHASTIC)
def test_noise_is_of_each_videos_seed(kind):
    name, scheduler, settings = STOCHASTIC[kind]
    pipe, call = with_scheduler(name, scheduler, **settings)
    start = rollout(pipe, **call, generator=of_seeds(3, 4)).detach()
    torch.manual_seed(5)
    frames = rollout(pipe, LastSteps(2), **call, generator=of_seeds(3, 4))
    assert torch.equal(frames, start)
    with seeded(pipe, together := of_seeds(3, 4), 0):
        assert torch.equal(pipe(**call, generator=together, output_type="pt").frames, frames)
    alone = [
        rollout(pipe, **{**call, "prompt": [prompt]}, generator=of_seeds(seed))
        for prompt, seed in zip(call["prompt"], (3, 4), strict=True)
    ]
    assert relative_error(torch.cat(alone), frames) < 1e-5
    other = rollout(pipe, **call, generator=of_seeds(3, 5))
    assert relative_error(other[:1], frames[:1]) < 1e-5
    assert relative_error(other[1:], frames[1:]) > 1e-2


@pytest.mark.parametrize("count", [1, 2, 4])
def test_gradient_of_a_loop_by_hand(count, monkeypatch):
    """x' = (1 - s') x0 + s' n, where x0 = x - s y and n is new in every step."""
    monkeypatch.setattr(torch, "float32", torch.float64)  # pipelines and schedulers ask for it by name
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    pipe, call = with_scheduler("wan_t2v", "FlowMatchEulerDiscreteScheduler", stochastic_sampling=True)
    pipe.to(torch.float64)
    latents = torch.randn(2, 4, 2, 4, 4, dtype=torch.float64)
    call = {**call, "latents": latents}
    ours = latents_of(pipe, LastSteps(count), {**call, "generator": of_seeds(3, 4)})[0]
    predict, generators = predictor(pipe, call), of_seeds(3, 4)
    for i, time in enumerate(pipe.scheduler.timesteps):
        now, then = pipe.scheduler.sigmas[i : i + 2]
        with nullcontext() if i >= 4 - count else torch.no_grad():
            unconditional, conditional = predict(latents, time)
            clean = latents - now * (unconditional + call["guidance_scale"] * (conditional - unconditional))
        noise = torch.stack([torch.randn(4, 2, 4, 4, generator=one, dtype=torch.float64) for one in generators])
        latents = (1 - then) * clean + then * noise
    assert distance(ours, latents) < 1e-12
    weight = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grads = [torch.autograd.grad((made * weight).mean(), weights_of(pipe)) for made in (ours, latents)]
    assert distance(*(torch.cat([grad.flatten() for grad in found]) for found in grads)) < 1e-10


def test_a_repeated_last_step_draws_the_same(monkeypatch):
    """DDIM's last step has noise if it does not end at the clean latents."""
    pipe, call = with_scheduler("animatediff", "DDIMScheduler", set_alpha_to_one=False)
    noisy, noised = [], RecordedLastStep.noised

    def keep(pipe, step, time, tensors):
        noisy.append(tensors["latents"])
        return tensors

    def again(self, scheduler, noise):
        noised(self, scheduler, noise)
        return noisy[self._loop.announced - 2]

    monkeypatch.setattr(RecordedLastStep, "noised", again)
    call = {**call, "eta": 1.0, "callback_on_step_end": keep, "generator": of_seeds(3, 4)}
    assert torch.equal(*rollout(pipe, LowVariance(1), **call).chunk(2))


@pytest.mark.filterwarnings("ignore:Should have t:UserWarning")
def test_a_brownian_motion_for_each_video():
    pytest.importorskip("torchsde")
    pipe, call = with_scheduler("cogvideox", "DPMSolverSDEScheduler")
    frames = [rollout(pipe, **call, generator=of_seeds(3, seed)) for seed in (4, 4, 5)]
    assert torch.equal(frames[0], frames[1])
    assert relative_error(frames[2][:1], frames[0][:1]) < 1e-5
    assert relative_error(frames[2][1:], frames[0][1:]) > 1e-2
    assert pipe.scheduler.noise_sampler_seed is None


def test_held_out_pairs_are_equal_without_training(model, tmp_path):
    scores = []
    for i, batch in enumerate((2, 1)):
        folder = tmp_path / str(i)
        folder.mkdir()
        config = tiny_runs.config(
            folder,
            model,
            "model.scheduler.name=FlowMatchLCMScheduler",
            "train.learning_rate=1e-30",
            "train.steps=1",
            f"validation.batch={batch}",
        )
        train(config)
        scores.append(json.loads((folder / "run" / "heldout.json").read_text()))
        assert scores[-1]["before"] == scores[-1]["after"]
    assert scores[0]["before"] == pytest.approx(scores[1]["before"], rel=1e-5)

"""Every scheduler of diffusers on a flow, a model of noise and one of v: the right videos or one sentence."""

import json
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from gradients import relative_error

from chopgrad_align import load_reward
from chopgrad_align.common.errors import UsageError
from chopgrad_align.sampling.predictions.probability_paths import path_of
from chopgrad_align.sampling.randomness import seeded
from chopgrad_align.sampling.scheduler_trial import SchedulerUse
from chopgrad_align.training.batches import call_inputs
from chopgrad_align.training.schedulers import Original, replaced_scheduler

# Schedulers of diffusers call numpy on tensors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context"),
]

NAMES = [name.removesuffix("Scheduler") for name in dir(diffusers) if name.endswith("Scheduler")]
DOCUMENT = Path(__file__).parents[1] / "docs" / "schedulers.md"
ROWS = [line.split("|")[2] for line in DOCUMENT.read_text().splitlines() if ", by " in line]
SAMPLERS = dict(zip(("flow", "noise", "v"), (row.replace(" ", "").split(",") for row in ROWS), strict=True))
"""Of each kind of model, the schedulers that sample it; those that need torchsde left out."""
NEEDS_TORCHSDE = {"DPMSolverSDE", "CosineDPMSolverMultistep"}
CONSISTENCY = {"FlowMatchLCM", "LCM"}
"""Samplers that draw anew from a prediction of the data, which is exact for consistency models alone."""


@pytest.fixture(scope="module")
def pipes():
    """A pipeline of each kind, of the noise schedules that published models have."""
    noise, v = tiny_pipelines.animatediff(), tiny_pipelines.cogvideox()
    noise.scheduler = type(noise.scheduler).from_config(noise.scheduler.config, steps_offset=1)
    v.scheduler = type(v.scheduler).from_config(
        v.scheduler.config, snr_shift_scale=3.0, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return {"flow": tiny_pipelines.wan_t2v("euler"), "noise": noise, "v": v}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_schedulers_that_can(kind, pipes):
    original = Original.of(pipes[kind], 16)
    can = {name for name in NAMES if original.can_be(f"{name}Scheduler")}
    assert can - NEEDS_TORCHSDE == set(SAMPLERS[kind])


class Gaussian:
    """The exact model of data with an independent normal distribution for each number: mean `mean`, deviation 0.5."""

    def __init__(self, path, mean):
        self.path, self.mean = path, mean

    def __call__(self, noised, timestep):
        time = max(self.path.time(float(timestep.flatten()[0])), 1e-4)
        nothing = torch.zeros_like(self.mean)
        a, s = (self.path.noised(*pair, time) for pair in ((nothing + 1, nothing), (nothing, nothing + 1)))
        clean = self.mean + a * 0.25 / (a**2 * 0.25 + s**2) * (noised - a * self.mean)
        return self.path.output(clean, (noised - a * clean) / s, time)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in SAMPLERS for name in SAMPLERS[kind]])
def test_the_pipeline_samples_the_models_distribution(kind, name, pipes, monkeypatch):
    """The pipeline's own code, whose denoiser is the exact model."""
    pipe = pipes[kind]
    model = Gaussian(path_of(pipe.scheduler), 0.0)
    denoiser = pipe.components.get("transformer") or pipe.unet

    def forward(*args, **kwargs):
        noised = next(kwargs[key] for key in ("hidden_states", "sample") if key in kwargs) if not args else args[0]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        model.mean = torch.randn(noised.shape[1:], generator=torch.Generator().manual_seed(1)).expand_as(noised)
        output = model(noised, timestep)
        return SimpleNamespace(sample=output) if kind == "noise" else (output,)

    monkeypatch.setattr(pipe, "scheduler", replaced_scheduler(pipe, {"name": f"{name}Scheduler"}, 50))
    monkeypatch.setattr(denoiser, "forward", forward)
    calls = {"flow": "wan_t2v", "noise": "animatediff", "v": "cogvideox"}
    call = dict(tiny_pipelines.CALLS[calls[kind]])
    call |= {"height": 64, "width": 64, "num_inference_steps": 50, "prompt": ["a"], "guidance_scale": 1.0}
    generator = torch.Generator().manual_seed(0)
    with seeded(pipe, generator, 0):
        latents = pipe(**call, generator=generator, output_type="latent").frames
    rest = latents - model.mean[:1]
    assert rest.mean().abs() < 0.05
    assert (0 if name in CONSISTENCY else 0.4) < rest.std() < 0.55


@pytest.mark.parametrize("own", ["euler", "unipc"])
@pytest.mark.parametrize("name", SAMPLERS["flow"])
def test_the_shift_is_carried_over(own, name):
    pipe = tiny_pipelines.wan_t2v(own)
    scheduler = replaced_scheduler(pipe, {"name": f"{name}Scheduler"}, 12)
    assert [scheduler.config[key] for key in ("shift", "flow_shift") if key in scheduler.config] == [3.0]
    scheduler.set_timesteps(12)
    middle = scheduler.timesteps[len(scheduler.timesteps) // 2] / 1000
    assert abs(middle - 0.75) < 0.05  # 3 s / (1 + 2 s) of s = 0.5
    given = replaced_scheduler(pipe, {"name": f"{name}Scheduler", **_shift(scheduler, 5.0)}, 12)
    assert 5.0 in given.config.values()


def _shift(scheduler, value):
    return {key: value for key in ("shift", "flow_shift") if key in scheduler.config}


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "UniPCMultistep", "HeunDiscrete"])
def test_the_noise_schedule_is_carried_over(name, pipes):
    """CogVideoX's has a shift and no data at the last time, for which other classes have no setting."""
    made = replaced_scheduler(pipes["v"], {"name": f"{name}Scheduler"}, 16)
    shares = pipes["v"].scheduler.alphas_cumprod
    assert torch.allclose(made.alphas_cumprod.double()[:-1], shares[:-1], rtol=1e-4)
    assert 0 <= made.alphas_cumprod[-1] < 1e-7
    assert made.config.prediction_type == "v_prediction"
    assert not made.config.get("clip_sample")


def test_what_the_pipeline_computes_the_shift_from_is_carried_over():
    """LTX reads it from the config of its scheduler."""
    pipe = object.__new__(diffusers.LTXPipeline)
    dynamic = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096}
    own = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **dynamic)
    vars(pipe)["scheduler"] = own
    made = replaced_scheduler(pipe, {"name": "UniPCMultistepScheduler"}, 16)
    assert dynamic.items() <= dict(made.config).items()
    assert made.config.use_dynamic_shifting
    for scheduler in (own, made):
        scheduler.set_timesteps(sigmas=np.linspace(1, 0.25, 4), mu=1.0)
    assert torch.allclose(made.sigmas, own.sigmas, atol=1e-5)
    with pytest.raises(
        UsageError, match=r"FlowMatchHeunDiscreteScheduler cannot .*brings sigmas of its own.*take one of"
    ):
        replaced_scheduler(pipe, {"name": "FlowMatchHeunDiscreteScheduler"}, 16)


def test_use_of_the_scheduler():
    def use(name):
        return SchedulerUse.of(object.__new__(getattr(diffusers, f"{name}Pipeline")))

    assert use("Wan") == SchedulerUse(False, False, False, False, use("Wan").knows)
    assert use("CogVideoX") == SchedulerUse(True, True, False, False, use("CogVideoX").knows)
    assert "CogVideoXDPMScheduler" in use("CogVideoX").knows
    assert use("LTX") == SchedulerUse(False, False, True, True, use("LTX").knows)
    assert use("Mochi").brings_sigmas
    assert not use("HunyuanVideo").brings_shift


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "flow",
            {"name": "DDIMScheduler"},
            r"^model.scheduler.name: DDIMScheduler cannot sample this model, which pre",
        ),
        ("flow", {"name": "LCMScheduler"}, r"LCMScheduler cannot .* velocities of a flow: .*; take one of DPMSolverMu"),
        ("flow", {"name": "KarrasVeScheduler"}, r"TypeError: .*missing 1 required positional argument.*; take one of"),
        ("flow", {"name": "LTXEulerAncestralRFScheduler"}, r"no setting for the shift of the times by 3.0; take one"),
        (
            "flow",
            {"name": "DEISMultistepScheduler"},
            r"sampled with an error of 0.\d+ standard deviations of the data;",
        ),
        (
            "flow",
            {"name": "UniPCMultistepScheduler", "prediction_type": "epsilon"},
            r"with {'pre.*} cannot sample this",
        ),
        ("flow", {"name": "UniPCMultistepScheduler", "solver_order": "2"}, r"solver_order: expected int, got '2'$"),
        (
            "flow",
            {"name": "UniPCMultistepScheduler", "solver_type": 2},
            r"solver_type: expected (str|one of .*), got 2",
        ),
        ("flow", {"shift": "high"}, r"^model.scheduler.shift: expected float, got 'high'$"),
        ("flow", {"invert_sigmas": True}, r"^model.scheduler: FlowMatchEuler\w+ with {'invert_sigmas': True} cannot"),
        ("noise", {"name": "FlowMatchEulerDiscreteScheduler"}, r"which predicts noise: it asks for the time 1000, "),
        ("noise", {"prediction_type": "v_prediction"}, r"DDIMScheduler with {'prediction_type': .* cannot sample this"),
        ("noise", {"beta_schedule": "scaled_linear"}, r"times the noise that the model expects there$"),
        ("v", {"name": "DDIMInverseScheduler"}, r"which predicts v, of data and noise: .*; take one of CogVideoXDDIM"),
        ("v", {"name": "RePaintScheduler"}, r"RePaintScheduler cannot sample this model"),
    ],
)
def test_one_sentence(kind, settings, message, pipes):
    state = torch.get_rng_state()
    with pytest.raises(UsageError, match=message):
        replaced_scheduler(pipes[kind], settings, 16)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_of_an_unknown_kind_keeps_its_class(pipes):
    pipe = tiny_pipelines.wan_t2v("euler")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)  # as Mochi's
    assert replaced_scheduler(pipe, {"shift": 2.0}, 16).config.shift == 2.0
    with pytest.raises(
        UsageError, match=r"cannot take the place of FlowMatchEuler.*what its model predicts is not known"
    ):
        replaced_scheduler(pipe, {"name": "UniPCMultistepScheduler"}, 16)


@pytest.fixture(scope="module")
def embedded():
    root = files("chopgrad_align") / "embedded"
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(root / "pipeline"))
    pipe.set_progress_bar_config(disable=True)
    prompts = (root / "prompts_held_out.txt").read_text().splitlines()
    return pipe, json.loads((root / "pipeline" / "call_defaults.json").read_text()), prompts


def test_other_solvers_of_the_embedded_pipeline_reach_its_latents(embedded, monkeypatch):
    pipe, call, prompts = embedded
    call |= {"num_inference_steps": 8, "guidance_scale": 1.0}

    def latents(scheduler):
        monkeypatch.setattr(pipe, "scheduler", scheduler)
        return pipe(**call, **call_inputs(pipe, prompts[:1], [0]), output_type="latent").frames

    own = pipe.scheduler
    expected = latents(own)
    for name in ("UniPCMultistep", "DPMSolverMultistep"):
        monkeypatch.setattr(pipe, "scheduler", own)
        replaced = replaced_scheduler(pipe, {"name": f"{name}Scheduler"}, 8)
        assert relative_error(latents(replaced), expected) < 0.1  # 32 where it takes velocities for noise


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS["flow"])
def test_scores_of_the_embedded_pipeline(name, embedded, monkeypatch):
    """0.844 by its own scheduler; 0.42 by UniPC and DPM++ that took its velocities for noise."""
    pipe, call, prompts = embedded
    monkeypatch.setattr(pipe, "scheduler", replaced_scheduler(pipe, {"name": f"{name}Scheduler"}, 16))
    inputs = call_inputs(pipe, prompts[:8], range(8))
    with torch.no_grad(), seeded(pipe, inputs["generator"], 0):
        score = load_reward("clip_score")(pipe(**call, **inputs, output_type="pt").frames, prompts[:8]).mean()
    assert score > (0.76 if name == "FlowMatchLCM" else 0.82)

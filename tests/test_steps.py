"""Sampling policies: their plans, and in float64 their gradients against a sampling loop written by hand."""

import contextlib
from dataclasses import dataclass

import pytest
import torch
from test_rollout import generators, make, plain, weights_of
from torch import Tensor
from torch.utils._pytree import tree_map_only

from chopgrad_align import (
    Exact,
    LastSteps,
    LowVariance,
    RandomLast,
    RandomSteps,
    StepPlan,
    Steps,
    UsageError,
    rollout,
)
from chopgrad_align.decoding.backprop import Full
from chopgrad_align.sampling.gradient_steps import with_constant_latents
from chopgrad_align.sampling.guidance_branches import GuidanceBranches
from chopgrad_align.sampling.last_step import RecordedLastStep
from chopgrad_align.sampling.rollout import check_call, rollout_parts

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Float64 instead of the single precision that pipelines, schedulers and norms ask for by name."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@pytest.fixture(scope="module")
def problem():
    """A tiny pipeline in float64, the least call of it with four steps, and the latents that it starts from."""
    made = {}

    def problem_of(kind: str):
        if kind not in made:
            pipe, call = make(kind)
            pipe.to(torch.float64)
            call = {**call, "num_inference_steps": 4}
            start = torch.randn_like(latents_of(pipe, LastSteps(1), call)[0])
            made[kind] = pipe, {**call, "latents": start}
        return made[kind]

    return problem_of


def latents_of(pipe, policy, call, **options) -> list[Tensor]:
    return [made.video for made in rollout_parts(pipe, call, policy, Full(), output_type="latent", **options)]


def predictor(pipe, call):
    """The unconditional and the conditional prediction by hand, as a function of latents and time."""
    with torch.no_grad():
        text, negative = pipe.encode_prompt(
            call["prompt"], None, max_sequence_length=call.get("max_sequence_length", 226)
        )
    denoiser = pipe.transformer

    def separate(latents: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        times = time.expand(len(latents))
        return tuple(denoiser(latents, times, embeds, return_dict=False)[0] for embeds in (negative, text))

    def batched(latents: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        both, embeds = torch.cat([latents] * 2), torch.cat([negative, text])
        return tuple(denoiser(both, embeds, time.expand(len(both)), return_dict=False)[0].chunk(2))

    return separate if type(pipe).__name__ == "WanPipeline" else batched


def by_hand(pipe, call, plan: StepPlan) -> Tensor:
    """The sampler's latents with plain autograd: a graph of everything, and a `detach` where the plan says so."""
    predict, scheduler = predictor(pipe, call), pipe.scheduler
    scheduler.set_timesteps(call["num_inference_steps"])
    latents = call["latents"] * getattr(scheduler, "init_noise_sigma", 1.0)
    scaled = getattr(scheduler, "scale_model_input", lambda latents, time: latents)
    for i, time in enumerate(scheduler.timesteps):
        chosen = i // scheduler.order in plan.steps
        seen = scaled(latents, time)
        unconditional, conditional = predict(seen.detach() if plan.detach_input else seen, time)
        if not plan.unconditional:
            unconditional = unconditional.detach()
        guided = unconditional + call["guidance_scale"] * (conditional - unconditional)
        latents = scheduler.step(guided if chosen else guided.detach(), time, latents, return_dict=False)[0]
    return latents


def gradient(pipe, *parts: Tensor) -> Tensor:
    """Of the mean of a fixed linear function of these latents."""
    weight = torch.randn(parts[0].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    score = sum((part * weight).mean() for part in parts) / len(parts)
    grads = torch.autograd.grad(score, weights_of(pipe), allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


POLICIES = {
    "last": LastSteps(2),
    "last_detached": LastSteps(3, detach_input=True),
    "middle": Steps([1]),
    "ends": Steps([0, -1]),
    "ends_detached": Steps([0, -1], detach_input=True),
    "random_last": RandomLast(3),
    "random_detached": RandomSteps(2, detach_input=True),
    "conditional": Steps([0, 2], unconditional=False),
    "drtune_conditional": LastSteps(2, detach_input=True, unconditional=False),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["wan_euler", "wan_unipc", "cogvideox", "cogvideox_heun"])
def test_gradient_of_a_loop_by_hand(kind, policy, problem):
    pipe, call = problem(kind)
    plan = POLICIES[policy].plan(4, seed=5)
    [ours] = latents_of(pipe, POLICIES[policy], call, steps_seed=5)
    expected = by_hand(pipe, call, plan)
    assert torch.equal(ours, expected)
    assert distance(gradient(pipe, ours), gradient(pipe, expected)) < 1e-10


def test_each_choice_is_another_gradient(problem):
    """What the comparison above rests on: on these problems the definitions differ."""
    pipe, call = problem("wan_euler")
    plans = [
        Steps(steps, **paths)
        for steps in ([0, 1], [2, 3])
        for paths in ({}, {"detach_input": True}, {"unconditional": False})
    ]
    grads = [gradient(pipe, *latents_of(pipe, plan, call)) for plan in plans]
    assert all(distance(a, b) > 1e-3 for i, a in enumerate(grads) for b in grads[:i])


@dataclass(frozen=True)
class Stratified:
    """A policy of a user: one step of each half of the schedule, as DRTune draws them."""

    def plan(self, num_steps: int, seed: int) -> StepPlan:
        stride = num_steps // 2
        offset = seed % stride
        return StepPlan(range(offset, num_steps, stride), detach_input=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_policy_from_outside(seed, problem):
    pipe, call = problem("wan_euler")
    check_call(pipe, call, Stratified())
    [ours] = latents_of(pipe, Stratified(), call, steps_seed=seed)
    expected = by_hand(pipe, call, StepPlan([seed, seed + 2], detach_input=True))
    assert distance(gradient(pipe, ours), gradient(pipe, expected)) < 1e-10


def test_an_impossible_plan_from_outside_is_refused(problem):
    pipe, call = problem("wan_euler")

    class Wrong:
        def plan(self, num_steps, seed):
            return StepPlan(seed * [num_steps])

    for seed, steps in ((0, r"\[\]"), (1, r"\[4\]")):
        with pytest.raises(UsageError, match=f"planned the steps {steps}: expected at least one, and each from 0 to 3"):
            latents_of(pipe, Wrong(), call, steps_seed=seed)


# --- repetitions of the last step -------------------------------------------------------------------------------------


def last_step_by_hand(pipe, call, clean: Tensor, noise: Tensor) -> Tensor:
    """The clean latents that are predicted from these ones, noised to the last level of the schedule."""
    time, scheduler = pipe.scheduler.timesteps[-1], pipe.scheduler
    if type(pipe).__name__ == "WanPipeline":  # flow matching: x = (1 - s) clean + s noise, and y = noise - clean
        a, s = 1 - scheduler.sigmas[-2].double(), scheduler.sigmas[-2].double()
    else:  # v prediction: x = a clean + s noise, and y = a noise - s clean
        a, s = scheduler.alphas_cumprod[time].sqrt(), (1 - scheduler.alphas_cumprod[time]).sqrt()
    noised = a * clean + s * noise
    unconditional, conditional = predictor(pipe, call)(noised, time)
    guided = unconditional + call["guidance_scale"] * (conditional - unconditional)
    return noised - s * guided if type(pipe).__name__ == "WanPipeline" else a * noised - s * guided


@pytest.mark.parametrize("kind", ["wan_euler", "wan_unipc", "cogvideox"])
def test_low_variance_by_hand(kind, problem):
    pipe, call = problem(kind)
    ours = latents_of(pipe, LowVariance(2), {**call, "generator": torch.Generator().manual_seed(7)})
    generator = torch.Generator().manual_seed(7)
    first = by_hand(pipe, call, LastSteps(1).plan(4, 0))
    noises = [torch.randn(first.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    expected = [first, *(last_step_by_hand(pipe, call, first.detach(), noise) for noise in noises)]
    assert torch.equal(ours[0], first)
    # The schedule is in single precision.
    assert all(distance(a, b) < 1e-6 for a, b in zip(ours, expected, strict=True))
    assert distance(gradient(pipe, *ours), gradient(pipe, *expected)) < 1e-6
    assert distance(ours[1], ours[2]) > 1e-2


@pytest.mark.parametrize("kind", ["wan_euler", "cogvideox_heun", "svd", "animatediff"])
def test_a_repetition_from_the_same_noisy_latents_is_the_same_clip(kind, problem, monkeypatch):
    """So that conditions, random ones too, and the scheduler are those of the last step."""
    pipe, call = problem(kind)
    noisy, noised = [], RecordedLastStep.noised

    def keep(pipe, step, time, tensors):
        noisy.append(tensors["latents"])
        return tensors

    def again(self, scheduler, noise):
        noised(self, scheduler, noise)
        return noisy[self._loop.iteration - 1]

    monkeypatch.setattr(RecordedLastStep, "noised", again)
    first, second = latents_of(pipe, LowVariance(1), {**call, "callback_on_step_end": keep, "generator": generators()})
    assert torch.equal(first, second)
    assert distance(gradient(pipe, first), gradient(pipe, second)) < 1e-12


def test_clips_of_low_variance(problem):
    pipe, call = problem("wan_euler")
    frames = rollout(pipe, LowVariance(2), **call, generator=generators())
    assert frames.shape[0] == 3 * 2
    assert torch.equal(frames[:2], plain(pipe, **call))
    assert torch.equal(frames, rollout(pipe, LowVariance(2), **call, generator=generators()))
    assert [made.share for made in rollout_parts(pipe, call, LowVariance(2), Exact())] == [1 / 3] * 3
    with torch.no_grad():
        assert torch.equal(rollout(pipe, LowVariance(2), **call, generator=generators()), frames)
    once = {**call, "num_inference_steps": 1}
    with pytest.raises(UsageError, match=r"LowVariance\(2\) repeats the last of several steps"):
        rollout(pipe, LowVariance(2), **once)


def test_low_variance_takes_single_steps(problem):
    pipe, call = problem("wan_euler")
    calls = []
    with torch.no_grad(), hooked(pipe.transformer.patch_embedding, lambda *_: calls.append(1)):
        rollout(pipe, LowVariance(3), **call)
    assert len(calls) == 2 * (4 + 3)  # twice a step, for guidance


# --- the unconditional branch -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def hooked(module, hook):
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def constant_half(prediction: Tensor) -> Tensor:
    """A double batch whose first half is unconditional."""
    unconditional, conditional = prediction.chunk(2)
    return torch.cat([unconditional.detach(), conditional])


def test_an_unconditional_call_of_its_own_is_not_run_again(problem):
    pipe, call = problem("wan_euler")
    counts = []
    for unconditional in (True, False):
        calls = []
        with hooked(pipe.transformer.patch_embedding, lambda *_, calls=calls: calls.append(1)):
            gradient(pipe, *latents_of(pipe, LastSteps(2, unconditional=unconditional), call))
        counts.append(len(calls))
    assert counts == [8 + 4, 8 + 2]


@pytest.mark.parametrize("kind", ["svd", "animatediff"])
def test_unconditional_half_of_a_batch_without_a_name(kind, problem):
    """Of UNets, whose pipelines do not name their calls: the halves by hand, in the denoiser's output."""
    pipe, call = problem(kind)
    call = {**call, "num_inference_steps": 2}
    [ours] = latents_of(pipe, LastSteps(1, unconditional=False), {**call, "generator": generators()})

    with hooked(pipe.unet, lambda *seen: tree_map_only(Tensor, constant_half, seen[-1])):
        [expected] = latents_of(pipe, LastSteps(1), {**call, "generator": generators()})
    assert torch.equal(ours, expected)
    assert distance(gradient(pipe, ours), gradient(pipe, expected)) < 1e-10


def test_constant_latents_leave_the_output_of_a_controlnet(problem):
    """It goes into the UNet beside the latents, and carries the gradient of its own weights."""
    unet = problem("animatediff")[0].unet
    latents, text, residual = (torch.zeros(1, requires_grad=True) for _ in range(3))
    args, kwargs = with_constant_latents(unet, (latents, 0, text), {"mid_block_additional_residual": residual})
    assert [value.requires_grad for value in (args[0], args[2])] == [False, True]
    assert kwargs["mid_block_additional_residual"] is residual
    with pytest.raises(
        UsageError, match="call of Linear has none of the arguments action_tokens, audio_hidden_states, "
    ):
        with_constant_latents(torch.nn.Linear(1, 1), (latents,), {})


def test_branches_that_cannot_be_told_are_refused():
    from diffusers import FlowMatchEulerDiscreteScheduler

    branches, sample = GuidanceBranches(), torch.zeros(2, 4)
    for output in (torch.zeros(2, 4), torch.zeros(2, 4)):
        branches.predicted((output,))
    with pytest.raises(UsageError, match="called for 2, 2 clips in a step for 2, and nothing says which"):
        branches.detach(FlowMatchEulerDiscreteScheduler(), (sample, 0.0, sample), {})


# --- plans ------------------------------------------------------------------------------------------------------------


def test_plans():
    def steps(policy, num_steps=5, seed=0):
        return sorted(policy.plan(num_steps, seed).steps)

    assert steps(LastSteps(2)) == [3, 4]
    assert steps(LastSteps(9)) == [0, 1, 2, 3, 4]
    assert steps(Steps([-1, 0])) == [0, 4]
    assert steps(LowVariance(3)) == [4]
    assert LowVariance(3).plan(5, 0).repeats == 3
    assert [policy(7).plan(5, 0).surplus for policy in (LastSteps, RandomLast, RandomSteps)] == [2, 2, 2]
    plan = RandomSteps(2, detach_input=True, unconditional=False).plan(5, 0)
    assert (plan.detach_input, plan.unconditional) == (True, False)


def test_random_plans_are_uniform_and_of_their_seed():
    lengths = [len(RandomLast(3).plan(5, seed).steps) for seed in range(600)]
    assert all(150 < lengths.count(length) < 250 for length in (1, 2, 3))
    assert all(RandomLast(3).plan(5, seed).steps == set(range(5 - n, 5)) for seed, n in enumerate(lengths))
    chosen = [step for seed in range(600) for step in RandomSteps(2).plan(5, seed).steps]
    assert len(chosen) == 1200
    assert all(180 < chosen.count(step) < 300 for step in range(5))
    assert RandomSteps(3).plan(9, 7) == RandomSteps(3).plan(9, 7)


@pytest.mark.parametrize("policy", [RandomLast, RandomSteps, LowVariance], ids=["last", "steps", "variance"])
@pytest.mark.parametrize("count", [0, 1.0, True, "all", None], ids=str)
def test_bad_counts(policy, count):
    with pytest.raises(UsageError, match=rf"{policy.__name__}: count=.*expected a whole number, 1 or more"):
        policy(count)


@pytest.mark.parametrize("indices", [[], 2, None, [1, 1], [0.5], [True], "12"], ids=str)
def test_bad_indices(indices):
    with pytest.raises(UsageError, match="expected a list of different whole numbers, such as"):
        Steps(indices)


def test_indices_that_the_sampler_does_not_have():
    with pytest.raises(UsageError, match=r"Steps\(\[0, 5\]\): the sampler takes 5 steps, .* no step 5: .* -5 to 4"):
        Steps([0, 5]).plan(5, 0)
    with pytest.raises(UsageError, match="of 5 steps two of these are the same one"):
        Steps([4, -1]).plan(5, 0)


def test_policies_are_values():
    assert Steps([1, 2]) == Steps((1, 2))
    assert len({LastSteps(1), LastSteps(1), LastSteps(1, detach_input=True), Steps([1])}) == 3

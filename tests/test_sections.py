"""Pipelines that sample in sections, or call their scheduler otherwise than once a step, against plain autograd.

In float64, where a term that is missing cannot hide in rounding. Each case says which calls of the denoiser carry
gradient, in the order in which the pipeline makes them.
"""

import copy
import functools
import inspect
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import tiny_pipelines
import torch
from every_pipeline import ENTRIES
from peft import LoraConfig, inject_adapter_in_model
from test_rollout import close, everything_restored, make, saved_bytes
from test_steps import float64  # noqa: F401 (a fixture, of all tests here)
from torch import Tensor

from chopgrad_align import LastSteps, LowVariance, SampledReward, Samples, StepPolicy, Steps, UsageError, rollout
from chopgrad_align.decoding.backprop import Full
from chopgrad_align.objective.objective import Objective
from chopgrad_align.objective.terms import RewardTerm
from chopgrad_align.sampling.outputs import frames_of
from chopgrad_align.sampling.rollout import differentiable, rollout_parts
from chopgrad_align.training.methods import DirectGradient, MicroBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
]


@dataclass(frozen=True)
class Case:
    """A pipeline, and the denoiser's calls that carry gradient by a policy."""

    entry: str
    policy: StepPolicy
    calls: set[int]
    changes: dict = field(default_factory=dict)
    output_type: str = "pt"


CASES = {
    # The scheduler is called twice a step, and the safety checker leaves no pixels to differentiate.
    "cosmos": Case("CosmosTextToWorldPipeline", LastSteps(2), {2, 3, 4, 5}, output_type="latent"),
    # Each latent frame has a copy of the scheduler; asynchronously, the second begins one iteration after the first.
    "copies": Case("SkyReelsV2DiffusionForcingPipeline", LastSteps(1), {2, 3}),
    "wave": Case("SkyReelsV2DiffusionForcingPipeline", LastSteps(2), {2, 3, 4, 5}, {"ar_step": 1}),
    # Chunks that see the one before; two calls a step.
    "chunks": Case("HeliosPipeline/chunks", LastSteps(1), {2, 3, 6, 7}),
    "first_chunk": Case("HeliosPipeline/chunks", Steps([0], sections=[0]), {0, 1}),
    "second_chunk": Case("HeliosPipeline/chunks", LastSteps(2, sections=[1]), {4, 5, 6, 7}),
    "pyramid": Case("HeliosPyramidPipeline", LastSteps(1), {2, 3, 6, 7, 10, 11}),
    "framepack": Case("HunyuanVideoFramepackPipeline/sections", LastSteps(1), {1, 3, 5}),
    # Between its two chunks a call fills the cache of keys and values.
    "cache": Case("AnyFlowFARPipeline", LastSteps(2), {0, 1, 3, 4}),
    # Latents are written into after the call that they were given to.
    "in_place": Case("Kandinsky5T2VPipeline", LastSteps(2), {0, 1, 2, 3}),
    # The loop is two steps shorter than the schedule, which the pipeline does not say.
    "first_frame": Case("Kandinsky5I2VPipeline", LastSteps(1), {2, 3}),
    "from_video": Case("VideoToVideoSDPipeline", LastSteps(1), {1}, {"num_inference_steps": 4, "strength": 0.5}),
    # Attention processors are there for the time of the call.
    "processors": Case("AnimateDiffPAGPipeline", LastSteps(1), {1}),
    # Of the schedule the last time is left out.
    "windows": Case("LTXI2VLongMultiPromptPipeline", LastSteps(1), {1}, {"num_inference_steps": 3}),
}


def problem(entry: str, changes: dict):
    """A pipeline in float64 with a random LoRA, and the arguments of its call."""
    pipe = ENTRIES[entry].make()
    torch.manual_seed(1)
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=ENTRIES[entry].targets, init_lora_weights=False), denoiser_of(pipe)
    )
    pipe.to(torch.float64)
    return pipe, {**ENTRIES[entry].call, **ENTRIES[entry].row, **changes}


def denoiser_of(pipe):
    return pipe.components.get("transformer") or pipe.components["unet"]


def seeded(call: dict) -> dict:
    torch.manual_seed(4)  # some pipelines draw from the global generator
    return {**call, "generator": torch.Generator().manual_seed(3)}


def plain_autograd(pipe, call: dict, chosen: set[int], output_type: str) -> Tensor:
    """The pipeline's own call in grad mode, in which all but the chosen calls of the denoiser give constants."""
    denoiser, count = denoiser_of(pipe), 0
    forward, encode = denoiser.forward, pipe.vae.encode

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        with torch.set_grad_enabled(count - 1 in chosen):
            return forward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vars(denoiser), "forward", counted)
        patch.setitem(vars(pipe.vae), "encode", torch.no_grad()(encode))
        if (normalized := getattr(pipe, "adaptive_mean_std_normalization", None)) is not None:
            patch.setattr(pipe, "adaptive_mean_std_normalization", lambda a, b: normalized(a, b.clone()), raising=False)
        if hasattr(pipe, "vae_decode_tiled"):
            patch.setattr(type(pipe), "vae_decode_tiled", inspect.unwrap(type(pipe).vae_decode_tiled))
        output = inspect.unwrap(type(pipe).__call__)(pipe, **seeded(call), output_type=output_type)
    return frames_of(pipe, output, output_type)


def gradient(pipe, video: Tensor, **options) -> Tensor:
    weight = torch.randn(video.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = [weight for weight in denoiser_of(pipe).parameters() if weight.requires_grad]
    found = torch.autograd.grad((video.double() * weight).mean(), weights, allow_unused=True, **options)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("name", CASES)
def test_gradient_of_plain_autograd(name, monkeypatch):
    case = CASES[name]
    if name == "pyramid":  # draws noise in the default type
        monkeypatch.setattr(torch, "randn", functools.partial(torch.randn, dtype=torch.float64))
    # Flex attention, which AnyFlow FAR uses, has a backward pass on CPUs, but says that it has none.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    pipe, call = problem(case.entry, case.changes)
    [made] = rollout_parts(pipe, seeded(call), case.policy, Full(), output_type=case.output_type)
    expected = plain_autograd(pipe, call, case.calls, case.output_type)
    assert torch.equal(made.video, expected)
    ours, kept = gradient(pipe, made.video), gradient(pipe, expected)
    assert kept.any()
    assert (ours - kept).norm() < 1e-10 * kept.norm()


def test_iterations_of_free_init_are_sections():
    """Each starts from what the one before it made, through a filter that is linear."""
    pipe, call = make("animatediff")
    pipe.to(torch.float64)
    pipe.enable_free_init(num_iters=2)
    for policy, chosen in ((LastSteps(1), {2, 5}), (Steps([1, 2], sections=[0]), {1, 2})):
        [made] = rollout_parts(pipe, seeded(call), policy, Full())
        kept = plain_autograd(pipe, call, chosen, "pt")
        assert torch.equal(made.video, kept)
        assert close(gradient(pipe, made.video), gradient(pipe, kept), 1e-10)


def test_a_section_costs_the_inputs_of_its_calls(monkeypatch):
    """What the graph holds grows by latents and history, not by activations. The decoder is left out."""
    pipe, call = problem("HeliosPipeline/chunks", {})

    def pixels(vae, latents, *args, **kwargs):
        return latents.new_zeros(1, 3, 9, 16, 16)

    def held(frames: int) -> int:
        def run():
            with differentiable(pipe, LastSteps(1), Full(), pixels) as sample:
                sample(**seeded({**call, "num_frames": frames}), output_type="latent")

        return saved_bytes(pipe, run)

    more = held(25) - held(17)
    monkeypatch.setattr(type(pipe.vae), "decode", lambda *args, **kwargs: (pixels(*args),))
    assert more < saved_bytes(pipe, lambda: plain_autograd(pipe, call, {2, 3}, "latent")) / 20


def test_sections_that_a_call_does_not_have():
    pipe, call = problem("HeliosPipeline/chunks", {})
    with pytest.raises(UsageError, match=r"sampled 2 section\(s\), and none of those that were chosen; .* from 0 to 1"):
        rollout(pipe, LastSteps(1, sections=[2]), **call)
    with torch.no_grad():
        rollout(pipe, LastSteps(1, sections=[2]), **call)
    assert everything_restored(pipe)
    for sections in ([], [-1], [0, 0], [0.5], 1):
        with pytest.raises(UsageError, match="LastSteps: sections"):
            LastSteps(1, sections=sections)


@pytest.mark.parametrize(
    "entry", ["CosmosTextToWorldPipeline", "SkyReelsV2DiffusionForcingPipeline", "HeliosPipeline/chunks"]
)
def test_low_variance_repeats_single_steps_only(entry):
    pipe, call = problem(entry, {})
    with pytest.raises(UsageError, match=r"LowVariance.* LastSteps\(1\)"):
        rollout(pipe, LowVariance(1), **call)
    assert everything_restored(pipe)


# --- what pipelines do outside of autograd ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    ["CosmosTextToWorldPipeline", "Cosmos2_5_PredictBasePipeline", "Cosmos2_5_TransferPipeline", "Cosmos3OmniPipeline"],
)
def test_gradient_passes_a_safety_checker(entry, monkeypatch):
    """Frames as the plain call returns them, in 8 bits; the gradient of those that the checker is given."""
    from chopgrad_align import decode

    pipe, call = problem(entry, {})
    call["enable_safety_check"] = True
    if "enable_safety_check" not in inspect.signature(type(pipe).__call__).parameters:
        del call["enable_safety_check"]
    if pipe.components.get("safety_checker") is None:
        pipe.register_modules(safety_checker=ENTRIES["CosmosTextToWorldPipeline"].make().safety_checker)
    # Cosmos 2.5 and 3 look whether it is the published one.
    module = inspect.getmodule(type(pipe))
    monkeypatch.setattr(module, "CosmosSafetyChecker", type(pipe.safety_checker), raising=False)
    pixels = []

    def keep(*args, **kwargs):
        pixels.append(decode(*args, **kwargs))
        return pixels[-1].clone()

    # Many pixels of random weights are saturated.
    [made] = rollout_parts(pipe, seeded(call), LastSteps(1), Full(saturated="pass"), decode=keep)
    assert torch.equal(made.video, frames_of(pipe, pipe(**seeded(call), output_type="pt")))
    given = (pixels[0] * 0.5 + 0.5).transpose(1, 2)
    assert not torch.equal(made.video.double(), given.clamp(0, 1).double())
    assert (made.video - given.clamp(0, 1)).abs().max() <= 1 / 255 + 1e-6
    ours, kept = gradient(pipe, made.video, retain_graph=True), gradient(pipe, given)
    assert kept.any()
    assert close(ours, kept, 1e-6)


def test_sound_with_its_gradient(monkeypatch):
    """LTX-2's, which a copy of the scheduler steps beside the video."""
    pipe, call = problem("LTX2Pipeline", {})
    frames, sound = rollout(pipe, LastSteps(1), audio=True, **seeded(call))
    plain = pipe(**seeded(call), output_type="pt")
    assert torch.equal(frames, plain.frames)
    assert torch.equal(sound, plain.audio)
    total = 0

    def counted(module, args):
        nonlocal total
        total += 1

    handle = pipe.transformer.register_forward_pre_hook(counted)
    pipe(**seeded(call), output_type="latent")
    handle.remove()
    monkeypatch.setattr("test_sections.frames_of", lambda pipe, output, output_type: output.audio)
    kept = plain_autograd(pipe, call, {*range(total // 2, total)}, "pt")
    assert close(gradient(pipe, sound), gradient(pipe, kept))
    with pytest.raises(UsageError, match="Kandinsky6TI2VAPipeline makes sound with sample_audio=True"):
        rollout(ENTRIES["Kandinsky6TI2VAPipeline"].make(), audio=True, prompt="a", sample_audio=False)
    with pytest.raises(UsageError, match="WanPipeline makes no sound"):
        rollout(tiny_pipelines.wan_t2v(), audio=True, **tiny_pipelines.CALLS["wan_t2v"])


# --- what can be known before sampling --------------------------------------------------------------------------------


def test_pipelines_that_make_no_videos_are_refused():
    from diffusers import Cosmos2TextToImagePipeline

    pipe = copy.copy(ENTRIES["Cosmos2VideoToWorldPipeline"].make())
    pipe.__class__ = Cosmos2TextToImagePipeline
    with pytest.raises(UsageError, match="Cosmos2TextToImagePipeline makes no videos"):
        rollout(pipe, prompt="a")


@pytest.mark.parametrize("entry", ["CogVideoXPipeline", "AllegroPipeline", "AnimateDiffPipeline"])
def test_several_videos_of_a_prompt_that_are_not_made(entry):
    pipe = ENTRIES[entry].make()
    with pytest.raises(UsageError, match="makes one video a prompt, whatever num_videos_per_prompt says"):
        rollout(pipe, **ENTRIES[entry].call, **ENTRIES[entry].row, num_videos_per_prompt=2)


def test_several_videos_of_a_prompt_that_fail():
    pipe, call = problem("WanImageToVideoPipeline", {})
    with pytest.raises(UsageError, match=r"WanImageToVideoPipeline fails with num_videos_per_prompt=2 \(Sizes of tens"):
        rollout(pipe, **call, num_videos_per_prompt=2)
    assert everything_restored(pipe)


@pytest.mark.parametrize("count", [3, 8])
def test_cosmos_2_5_makes_any_number_of_frames(count):
    pipe, call = problem("Cosmos2_5_PredictBasePipeline", {"num_frames": count})
    with torch.no_grad():
        assert rollout(pipe, **seeded(call)).shape[1] == count


class Loudness(SampledReward):
    reads_audio = True

    def score_video(self, video, prompts, sample: Samples | None = None):
        assert sample.audio_rate == 16000
        return torch.stack([sound.double().square().mean() for sound in sample.audio])


def test_rewards_are_told_the_sound_with_its_gradient():
    pipe, call = problem("LTX2Pipeline", {})
    weights = [weight for weight in denoiser_of(pipe).parameters() if weight.requires_grad]
    _, sound = rollout(pipe, LastSteps(1), Full(), audio=True, **seeded(call))
    expected = sound.double().square().mean()
    wanted = torch.autograd.grad(expected, weights, allow_unused=True)
    objective = Objective({"sound": RewardTerm(Loudness())})
    method = DirectGradient(pipe, seeded(call), objective, LastSteps(1), Full(), 1, lambda name: nullcontext())
    (row,) = method.accumulate(MicroBatch({}, ["a"], [0]), {})
    torch.testing.assert_close(row[1].double(), expected.detach(), rtol=1e-5, atol=0)
    found = torch.cat([-weight.grad.flatten() for weight in weights if weight.grad is not None])
    assert found.any()
    assert close(found, torch.cat([g.flatten() for g in wanted if g is not None]), 1e-6)

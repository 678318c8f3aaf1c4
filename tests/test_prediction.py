"""Clips predicted by one call of the denoiser, or by the sampler with conditions, and losses on them."""

import csv
import gc
import json
import runpy
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import tiny_pipelines
import torch
from diffusers import AutoencoderKLWan
from gradients import relative_error
from tiny_runs import ROOT, rows

from chopgrad_align import Exact, Full, LastSteps, Truncated, load_reward
from chopgrad_align.common.errors import UsageError
from chopgrad_align.common.storage_count import StorageCount
from chopgrad_align.data.video import write_video
from chopgrad_align.objective.losses import load_loss
from chopgrad_align.objective.objective import Objective
from chopgrad_align.objective.terms import LatentTerm, LossTerm, RewardTerm
from chopgrad_align.sampling.predictions import Denoise, OneStep, Sample
from chopgrad_align.sampling.predictions.latents import encode
from chopgrad_align.sampling.predictions.one_call import one_call
from chopgrad_align.sampling.predictions.probability_paths import RectifiedFlow, VariancePreserving, path_of
from chopgrad_align.sampling.predictions.windows import predict_long, windows
from chopgrad_align.training.config_file import load_config
from chopgrad_align.training.methods import direct as step
from chopgrad_align.training.methods import streaming
from chopgrad_align.training.methods.direct import DirectGradient, MicroBatch
from chopgrad_align.training.phases import Phases
from chopgrad_align.training.predictors import HeldOutClips, restorers
from chopgrad_align.training.run import train


@pytest.fixture(scope="module")
def wan():
    return tiny_pipelines.wan_t2v("euler")


def clips(batch=2, seed=0, frames=5):
    """A batch of smooth targets and degraded versions of them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch * frames, 3, 4, 4, generator=generator)
    target = torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear").view(batch, frames, 3, 16, 16)
    return {"target": target, "degraded": (target + 0.1 * torch.randn(target.shape, generator=generator)).clamp(0, 1)}


def inputs(prompts=("a", "b"), frames=5):
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    prompt = list(prompts) if len(prompts) > 1 else prompts[0]
    generator = generators if len(prompts) > 1 else generators[0]
    return {"prompt": prompt, "generator": generator, "num_frames": frames, "height": 16, "width": 16}


def batch_of(videos, prompts=("a", "b"), seeds=(7, 8)):
    given = inputs(prompts, videos["target"].shape[1])
    return MicroBatch(given, list(prompts), frame_seeds=list(seeds), seeds=list(seeds), videos=videos)


def method(pipe, prediction, objective, backprop=Exact(), call=None):  # noqa: B008 (frozen)
    return DirectGradient(
        pipe=pipe,
        call={"guidance_scale": 1.0} | (call or {}),
        objective=objective,
        steps=LastSteps(1),
        backprop=backprop,
        batch_size=2,
        phases=Phases(torch.device("cpu")),
        prediction=prediction,
    )


def l2(weight=1.0):
    return LossTerm(load_loss("l2"), weight)


def gradients(pipe, run):
    """Of the denoiser's weights."""
    pipe.transformer.requires_grad_(True)
    try:
        run()
        return {n: p.grad.clone() for n, p in pipe.transformer.named_parameters() if p.grad is not None}
    finally:
        pipe.transformer.requires_grad_(False)
        pipe.transformer.zero_grad()


def error_of_all(found, expected):
    assert found.keys() == expected.keys() != set()
    return relative_error(*(torch.cat([of[name].flatten() for name in sorted(of)]) for of in (found, expected)))


# --- latents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_pipelines.wan_t2v, tiny_pipelines.cogvideox])
def test_the_pipeline_decodes_encoded_latents_to_the_reconstruction(make):
    pipe, video = make(), clips(frames=9)["target"]
    expected = pipe.vae.decode(pipe.vae.encode(video.transpose(1, 2) * 2 - 1).latent_dist.mode()).sample
    latents = encode(pipe, video)
    if make is tiny_pipelines.cogvideox:
        pixels = pipe.decode_latents(latents)
        assert latents.shape == (2, 3, 4, 4, 4)
    else:
        # A denoiser that finds no noise leaves its latents as they are.
        pipe.transformer.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states),)
        with one_call(pipe, path_of(pipe.scheduler), 0.5) as call:
            frames = pipe(
                latents=latents, **call.inputs, **inputs(frames=9), guidance_scale=1.0, output_type="pt"
            ).frames
        pixels = frames.transpose(1, 2) * 2 - 1
    torch.testing.assert_close(pixels.clamp(-1, 1), expected.clamp(-1, 1), rtol=0, atol=2e-5)


def test_a_pipeline_of_an_unknown_kind_is_refused():
    with pytest.raises(UsageError, match=r"AnimateDiffPipeline is not known to start from latents.*mode=sample"):
        encode(tiny_pipelines.animatediff(), clips()["target"])


# --- streamed losses --------------------------------------------------------------------------------------------------


def masked(videos):
    mask = torch.zeros_like(videos["target"][:, :, :1])
    mask[..., 4:12] = 1
    return {**videos, "mask": mask}


@pytest.mark.parametrize("make", [tiny_pipelines.wan_t2v, tiny_pipelines.cogvideox])
def test_streamed_losses_are_those_of_the_decoded_clip(make, monkeypatch):
    pipe, videos = make(), masked(clips(frames=9))
    objective = Objective(
        {
            "l1": LossTerm(load_loss("l1", frames_per_chunk=1, inside=2.0, outside=0.5), 0.7),
            "ssim": LossTerm(load_loss("ssim"), 0.2),
            "latent": LatentTerm("latents", 0.1),
        }
    )
    batch = replace(batch_of(videos), weights={"l1": [1.0, 3.0], "ssim": [2.0, 0.5], "latent": [1.0, 1.0]})
    rows, decoded = [], []
    stream = streaming.StreamedLosses.decode

    def decode(*args, **kwargs):
        decoded.append(stream(*args, **kwargs))
        return decoded[-1]

    monkeypatch.setattr(streaming.StreamedLosses, "decode", decode)
    found = {}
    for streamed in (True, False):
        monkeypatch.setattr(step, "can_stream", lambda *args, streamed=streamed: streamed)
        learner = method(pipe, OneStep(0.5), objective, Truncated(0))
        found[streamed] = gradients(pipe, lambda learner=learner: rows.append(learner.accumulate(batch, {})))
    torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-6)
    assert error_of_all(found[True], found[False]) < 1e-5
    assert [pixels.shape for pixels in decoded] == [(2, 3, 9, 1, 1)]


def test_streamed_losses_hold_no_clip_of_pixels(wan, monkeypatch):
    storage, peaks = StorageCount(), {}

    @contextmanager
    def phases(name):
        before = storage.peak = storage.now
        yield
        peaks.setdefault(name, []).append(storage.peak - before)

    for streamed in (True, False):
        monkeypatch.setattr(step, "can_stream", lambda *args, streamed=streamed: streamed)
        learner = replace(method(wan, OneStep(0.5), Objective({"l2": l2()}), Truncated(0)), phases=phases)
        for frames in (33, 65):
            videos = clips(1, frames=frames)
            with storage:
                gradients(
                    wan, lambda learner=learner, videos=videos: learner.accumulate(batch_of(videos, "a", [7]), {})
                )
    more = videos["target"].nbytes / 65 * 32
    growth = [long - short for short, long in zip(peaks["decoding"][::2], peaks["decoding"][1::2], strict=True)]
    assert growth[0] < more / 5 < more < growth[1]


@pytest.mark.parametrize(
    ("terms", "backprop", "streamed"),
    [
        ({"a": l2(), "b": LatentTerm("latents")}, Truncated(0), True),
        ({"a": l2()}, Truncated(1), False),
        ({"a": l2()}, Exact(), False),
        ({"a": LatentTerm("latents")}, Truncated(0), False),
        ({"a": l2(), "b": LossTerm(load_loss("frame_difference"))}, Truncated(0), False),
        ({"a": LossTerm(load_loss("l2", frames=2))}, Truncated(0), False),
        ({"a": l2(), "b": RewardTerm(load_reward("colorfulness"))}, Truncated(0), False),
    ],
)
def test_which_objectives_stream(terms, backprop, streamed):
    assert streaming.can_stream(Objective(terms), backprop) == streamed


def test_what_is_not_decoded_frame_group_by_frame_group_is_decoded_whole(wan):
    videos = clips(frames=9)
    learner = method(wan, OneStep(0.5), Objective({"l2": l2()}), Truncated(0))
    wan.vae.enable_slicing()
    try:
        sliced = gradients(wan, lambda: learner.accumulate(batch_of(videos), {}))
    finally:
        wan.vae.disable_slicing()
    streamed = gradients(wan, lambda: learner.accumulate(batch_of(videos), {}))
    assert error_of_all(sliced, streamed) < 1e-4


# --- time -------------------------------------------------------------------------------------------------------------

SHARES = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)
PATHS = [
    RectifiedFlow(1000.0),
    *(VariancePreserving(SHARES, prediction) for prediction in ("epsilon", "v_prediction", "sample")),
]


@pytest.mark.parametrize("path", PATHS, ids=["flow", "epsilon", "v", "sample"])
def test_what_the_model_should_return_leads_back_to_the_data(path):
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator).split(1)
    for time in (0.05, 0.4, 0.9, 1.0):
        noised = path.noised(clean, noise, time)
        torch.testing.assert_close(path.clean(path.output(clean, noise, time), noised, time), clean)


def test_the_noised_latents_are_those_of_the_schedulers_own():
    pipe = tiny_pipelines.cogvideox()
    path, (clean, noise) = path_of(pipe.scheduler), torch.randn(2, 1, 2, 4, 2, 2)
    step = path.timestep(0.6)
    expected = pipe.scheduler.add_noise(clean, noise, torch.tensor([step]))
    torch.testing.assert_close(path.noised(clean, noise, 0.6), expected)
    torch.testing.assert_close(
        path.output(clean, noise, 0.6), pipe.scheduler.get_velocity(clean, noise, torch.tensor([step]))
    )


def test_a_scheduler_of_neither_kind_is_refused(wan):
    from diffusers import EDMEulerScheduler

    with pytest.raises(UsageError, match="EDMEulerScheduler is not known to take one step"):
        path_of(EDMEulerScheduler())


# --- one step ---------------------------------------------------------------------------------------------------------


def one_step_by_hand(pipe, videos, time, prompts=("a", "b")):
    """Latents at a time, one call of the transformer, and the way to pixels, as formulas."""
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    with torch.no_grad():
        start = (pipe.vae.encode(videos["degraded"].transpose(1, 2) * 2 - 1).latent_dist.mode() - mean) / std
        text, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=512)
    velocity = pipe.transformer(start, torch.full((2,), 1000 * time), text, return_dict=False)[0]
    clean = start - time * velocity
    pixels = pipe.vae.decode(clean * std + mean).sample
    return clean, ((pixels + 1) / 2).clamp(0, 1).transpose(1, 2)


def test_one_step_is_one_call_at_its_time(wan):
    videos, scheduler = clips(), wan.scheduler
    with OneStep(0.3).prepare(wan, videos, (0, 1), False, latents=True) as begun, torch.no_grad():
        video = wan(**{**inputs(), **begun.inputs}, guidance_scale=1.0, output_type="pt").frames
    assert wan.scheduler is scheduler
    reference = begun.reference()
    clean, expected = one_step_by_hand(wan, videos, 0.3)
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(reference.latents[0], clean, rtol=0, atol=1e-5)
    torch.testing.assert_close(reference.latents[1], encode(wan, videos["target"]))
    assert reference.target is videos["target"]
    assert reference.mask is reference.outputs is None


def test_the_gradient_of_one_step_is_that_of_plain_autograd(wan):
    videos = clips()

    def ours():
        method(wan, OneStep(0.3), Objective({"l2": l2(3.0), "latent": LatentTerm("latents", 0.5)})).accumulate(
            batch_of(videos), {}
        )

    def plain():
        clean, video = one_step_by_hand(wan, videos, 0.3)
        pixels = (video - videos["target"]).square().flatten(1).mean(1)
        latents = (clean - encode(wan, videos["target"])).square().flatten(1).mean(1)
        ((3 * pixels + 0.5 * latents).sum() / 2).backward()

    found, expected = gradients(wan, ours), gradients(wan, plain)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-8)


def test_nothing_is_decoded_for_a_latent_loss(wan, monkeypatch):
    monkeypatch.setattr(wan.vae, "_decode", lambda *_, **__: pytest.fail("decoded"))
    objective = Objective({"latent": LatentTerm("latents")})
    found = gradients(wan, lambda: method(wan, OneStep(), objective).accumulate(batch_of(clips()), {}))
    assert max(g.abs().max() for g in found.values()) > 0


def test_only_the_frames_of_a_loss_are_decoded(wan):
    """A loss on the first frames has the gradient of those alone, by every policy."""
    videos = clips()
    results = []
    for backprop in (Exact(), Full()):
        term = LossTerm(load_loss("l1", frames="first"))
        run = method(wan, OneStep(0.3), Objective({"l1": term}), backprop)
        results.append(gradients(wan, lambda run=run: run.accumulate(batch_of(videos), {})))
    for name, gradient in results[1].items():
        torch.testing.assert_close(
            results[0][name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-8
        )


def test_the_scheduler_comes_back_after_an_error(wan):
    scheduler = wan.scheduler
    with pytest.raises(RuntimeError, match="mine"), OneStep().prepare(wan, clips(), (0, 1), False, False):
        raise RuntimeError("mine")
    assert wan.scheduler is scheduler


def test_a_role_that_is_not_there(wan):
    with pytest.raises(
        UsageError, match=r"prediction.source: the data has no role 'control'. It has: target, degraded"
    ):
        OneStep(source="control").prepare(wan, clips(), (0, 1), False, False).__enter__()
    with pytest.raises(UsageError, match=r"prediction.columns.video: the data has no role 'degrade'; did you mean"):
        Sample({"video": "degrade"}).prepare(wan, clips(), (0, 1), False, False).__enter__()
    with pytest.raises(UsageError, match="mode=denoise needs data with a target"):
        Denoise().prepare(wan, {}, (0, 1), False, False).__enter__()


def test_one_step_of_cogvideox():
    """Its model predicts the velocity of a variance-preserving schedule, its latents have frames first."""
    pipe, videos = tiny_pipelines.cogvideox(), clips(frames=9)
    objective = Objective({"l2": l2()})
    with OneStep(0.4).prepare(pipe, videos, (0, 1), False, True) as begun, torch.no_grad():
        video = pipe(**{**inputs(frames=9), **begun.inputs}, guidance_scale=1.0, output_type="pt").frames
    loss = objective.scores(video, ["a", "b"], [0, 1], begun.reference())["l2"]
    torch.testing.assert_close(loss, (video - videos["target"]).square().flatten(1).mean(1))
    run = method(pipe, OneStep(0.4), objective)
    found = gradients(pipe, lambda: run.accumulate(batch_of(videos), {}))
    assert max(g.abs().max() for g in found.values()) > 0


# --- denoise ----------------------------------------------------------------------------------------------------------


def test_the_diffusion_loss_is_the_usual_one(wan):
    videos, seeds, scores = clips(), (7, 8), []
    run = method(wan, Denoise((0.5, 0.5)), Objective({"diffusion": LatentTerm("outputs", 2.0)}))
    gradients(wan, lambda: scores.append(run.accumulate(batch_of(videos, seeds=seeds), {})))
    clean = encode(wan, videos["target"])
    noise = torch.stack([torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds])
    with torch.no_grad():
        text, _ = wan.encode_prompt(["a", "b"], do_classifier_free_guidance=False, max_sequence_length=512)
        velocity = wan.transformer((clean + noise) / 2, torch.full((2,), 500.0), text, return_dict=False)[0]
    expected = (velocity - (noise - clean)).square().flatten(1).mean(1)
    total, score, value = scores[0].T
    torch.testing.assert_close(score, expected)
    torch.testing.assert_close(total, -2 * expected)
    torch.testing.assert_close(value, total)


def test_times_are_drawn_by_the_seed_in_training_and_fixed_in_measurements(wan):
    def start(seeds, training):
        with Denoise((0.1, 0.9)).prepare(wan, clips(), seeds, training, False) as begun:
            return begun.inputs["latents"]

    assert torch.equal(start((1, 2), True), start((1, 2), True))
    clean = encode(wan, clips()["target"])
    noise = torch.stack([torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
    torch.testing.assert_close(start((1, 2), False), (clean + noise) / 2)
    assert not torch.equal(start((1, 2), True), start((1, 2), False))


def test_pixel_and_diffusion_loss_stand_beside_each_other(wan):
    objective = Objective({"l2": l2(), "diffusion": LatentTerm("outputs", 0.1)})
    rows = []
    run = method(wan, Denoise(), objective)
    found = gradients(wan, lambda: rows.append(run.accumulate(batch_of(clips()), {})))
    total, pixels, diffusion, *_ = rows[0].T
    torch.testing.assert_close(total, -(pixels + 0.1 * diffusion))
    assert max(g.abs().max() for g in found.values()) > 0


def test_a_call_leaves_nothing_behind():
    """What it saw has a graph; it goes when nobody asks for it any more, and not some time later."""
    pipe = tiny_pipelines.wan_t2v()
    gc.collect()
    gc.disable()
    try:
        with one_call(pipe, path_of(pipe.scheduler), 0.5) as call:
            pipe(prompt="a star", **call.inputs, height=16, width=16, num_frames=5, output_type="latent")
        assert call.output.shape == call.clean.shape
        seen = weakref.ref(call.output)
        del call
        assert seen() is None
    finally:
        gc.enable()


# --- the sampler with conditions --------------------------------------------------------------------------------------


def test_columns_become_arguments_of_vace():
    pipe, videos = tiny_pipelines.wan_vace(), {k: v[:1] for k, v in clips().items()}
    videos |= {"mask": (videos["target"][:, :, :1] > 0.5).float(), "image": videos["target"][:, :1]}
    columns = {"video": "degraded", "mask": "mask", "reference_images": "image"}
    run = method(pipe, Sample(columns), Objective({"l2": l2()}), call={"num_inference_steps": 2})
    scores = []
    found = gradients(pipe, lambda: scores.append(run.accumulate(batch_of(videos, prompts=("a",), seeds=(3,)), {})))
    assert max(g.abs().max() for g in found.values()) > 0
    frames = [[picture_of(f) for f in videos[role][0]] for role in ("degraded", "mask", "image")]
    video = pipe(
        video=frames[0],
        mask=frames[1],
        reference_images=frames[2][0],
        guidance_scale=1.0,
        num_inference_steps=2,
        output_type="pt",
        **inputs(("a",)),
    ).frames
    torch.testing.assert_close(scores[0][:, 1], (video - videos["target"]).square().flatten(1).mean(1))


def picture_of(frame):
    from torchvision.transforms.functional import to_pil_image

    return to_pil_image((frame.expand(3, -1, -1) * 255).round().byte())


# --- long videos ------------------------------------------------------------------------------------------------------


def test_windows_cover_the_video_and_end_with_it():
    assert windows(17, 17, 5) == [slice(0, 17)]
    assert windows(29, 17, 5) == [slice(0, 17), slice(12, 29)]
    assert windows(30, 17, 5) == [slice(0, 17), slice(12, 29), slice(13, 30)]
    with pytest.raises(UsageError, match="expected an overlap from 1 to 16 frames"):
        windows(30, 17, 17)


def test_a_prediction_that_needs_no_window_is_the_same_by_windows():
    video, seen = torch.rand(1, 31, 3, 4, 4), []

    def predict(videos):
        seen.append({role: v.shape[1] for role, v in videos.items()})
        return 1 - videos["degraded"]

    result = predict_long(predict, {"degraded": video, "image": video[:, :1]}, window=13, overlap=6, stride=4)
    torch.testing.assert_close(result, 1 - video)
    assert seen[0] == {"degraded": 13, "image": 1}
    assert [s["context"] for s in seen[1:]] == [5] * (len(seen) - 2) + [seen[-1]["context"]]
    assert all(s["context"] % 4 == 1 for s in seen[1:])


def test_one_step_goes_on_from_the_context(wan):
    videos = clips(frames=9)
    context = {**videos, "context": videos["target"][:, :5]}
    with OneStep(0.3).prepare(wan, context, (0, 1), False, False) as begun:
        latents = begun.inputs["latents"]
    torch.testing.assert_close(latents[:, :, :2], encode(wan, videos["target"][:, :5]))
    torch.testing.assert_close(latents[:, :, 2:], encode(wan, videos["degraded"])[:, :, 2:])
    with OneStep(0.3).prepare(wan, context, (0, 1), False, False) as begun:
        given = {**inputs(frames=9), "guidance_scale": 1.0, "output_type": "latent"}
        predicted = wan(**given, **begun.inputs).frames
    torch.testing.assert_close(predicted[:, :, :2], latents[:, :, :2])
    assert not torch.isclose(predicted[:, :, 2:], latents[:, :, 2:]).any(dim=1).all()


def test_the_sampler_keeps_the_context_from_the_middle_of_the_schedule(wan):
    from diffusers import WanVideoToVideoPipeline

    parts = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe = WanVideoToVideoPipeline(**{name: wan.components[name] for name in parts})
    pipe.set_progress_bar_config(disable=True)
    videos = {"context": clips(1, frames=5)["target"]}
    with Sample().prepare(pipe, videos, (0,), False, False) as begun:
        given = {"video": [tiny_pipelines.picture(i) for i in range(9)], "strength": 0.5, "num_inference_steps": 4}
        given |= {"height": 16, "width": 16, "guidance_scale": 1.0, "output_type": "latent", "prompt": "a"}
        latents = pipe(**given, **begun.inputs).frames
    torch.testing.assert_close(latents[:, :, :2], encode(pipe, videos["context"]))


def test_the_sampler_keeps_the_context(wan):
    videos = {"context": clips(frames=5)["target"]}
    with Sample().prepare(wan, videos, (0, 1), False, False) as begun:
        given = {**inputs(frames=9), "guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "latent"}
        latents = wan(**given, **begun.inputs).frames
    torch.testing.assert_close(latents[:, :, :2], encode(wan, videos["context"]))


# --- runs -------------------------------------------------------------------------------------------------------------

_CONFIG = """
run: {{folder: {folder}/run, seed: 3}}
model: {{name: {model}, call: {{height: 16, width: 16, num_frames: 5, num_inference_steps: 2, guidance_scale: 1.0}}}}
data:
  train: {folder}/clips
  held_out: {folder}/clips
  clips: {{degradation: {{name: downscale, factor: [2, 2]}}}}
prediction: {{mode: one_step}}
losses: {{charbonnier: {{name: charbonnier, weight: 2.0}}}}
train: {{steps: 2, batch_size: 2, learning_rate: 1.0e-2}}
lora: {{rank: 4}}
validation: {{pairs: 3, videos: 1}}
"""


@pytest.fixture(scope="module")
def saved_wan(tmp_path_factory, wan):
    folder = tmp_path_factory.mktemp("wan")
    wan.save_pretrained(folder)
    return folder


@pytest.fixture
def configure(tmp_path, saved_wan):
    folder = tmp_path / "clips"
    for i in range(2):
        write_video(folder / f"{i}.mp4", clips(1, seed=i)["target"][0].repeat(2, 1, 1, 1), 8)
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "caption"], ["0.mp4", "a"], ["1.mp4", "b"]])
    path = tmp_path / "task.yaml"
    path.write_text(_CONFIG.format(folder=tmp_path, model=saved_wan))
    return lambda *overrides: load_config(path, overrides)


@pytest.mark.parametrize(("mode", "kept"), [("one_step", 2), ("denoise", 2), ("one_step, repaired", 1)])
def test_latents_of_clips_that_come_again_are_kept(configure, tmp_path, monkeypatch, mode, kept):
    """Each of the two files has one clip, and a target and a degraded version of it that are the same."""
    overrides = [f"prediction.mode={mode.partition(',')[0]}", "losses={latent: {name: latent}}"]
    if "repaired" not in mode:
        overrides += ["~data.clips.degradation", "data.clips.columns={target: file_name, degraded: file_name}"]
    encoded = []
    original = AutoencoderKLWan.encode
    monkeypatch.setattr(
        AutoencoderKLWan, "encode", lambda vae, x, **kwargs: (encoded.append(1), original(vae, x, **kwargs))[1]
    )
    results = []
    for folder, more in (
        ("plain", ()),
        ("first", (f"data.cache={tmp_path / 'cache'}",)),
        ("again", (f"data.cache={tmp_path / 'cache'}",)),
    ):
        encoded.clear()
        config = configure(*overrides, "data.clips.starts=1", f"run.folder={tmp_path / folder}", *more)
        assert train(config) is not None
        results.append((len(encoded), [row["loss"] for row in rows(tmp_path / folder)]))
    (plain, losses), (first, same), (again, still) = results
    assert losses == same == still
    if "repaired" in mode:
        assert plain > first > again > 0
    else:
        assert plain > first == kept
        assert again == 0


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.clips.mask={name: box}", "losses.charbonnier.args={inside: 4.0}"),
        ("prediction.mode=denoise", "losses.diffusion={name: diffusion}"),
        ("prediction.mode=sample", "rewards.colour={name: colorfulness, weight: 0.1}"),
        ("prediction.mode=one_step", "losses={latent: {name: latent}}"),
        ("data.clips.buckets=[[5, 16, 16], [5, 16, 32]]", "gradient.decoder=truncated"),
    ],
    ids=["one_step", "mask", "denoise", "sample", "latent", "buckets"],
)
def test_a_run_of_every_mode(configure, tmp_path, overrides):
    config = configure(*overrides)
    assert train(config) is not None
    training = rows(tmp_path / "run")
    assert len(training) == 2
    assert all(row["grad_norm"] > 0 and row["loss"] == -row["reward"] for row in training)
    names = {*config.losses, *config.rewards}
    assert all({f"{name}/score" for name in names} <= row.keys() for row in training)
    held_out = json.loads((tmp_path / "run" / "heldout.json").read_text())
    assert held_out["prompts"] == ["a", "b", "a"]
    assert held_out["before"] != held_out["after"]
    sides = {path.name for path in (tmp_path / "run" / "samples").iterdir() if path.is_dir()}
    assert {"before", "after", "target"} <= sides
    assert all((tmp_path / "run" / "samples" / side / "000.mp4").is_file() for side in sides)


def test_what_was_saved_restores_what_its_run_measured(configure, tmp_path):
    """A LoRA and trained modules, beside each other on one pipeline."""
    loss = ("validation.videos=3", "losses.charbonnier.name=l1", "losses.charbonnier.weight=1.0")
    config = configure(*loss)
    train(config)
    modules = "trainable={name: modules, args: {modules: ['transformer.blocks.0.attn1.to_q', 'transformer.proj_out']}}"
    train(configure(*loss, "~lora", modules, f"run.folder={tmp_path}/modules"))
    measured = {run: json.loads((tmp_path / run / "heldout.json").read_text()) for run in ("run", "modules")}
    clips_ = HeldOutClips(config, 3)
    methods = restorers(config, {"base": None} | {run: tmp_path / run / "lora" for run in measured})
    assert len(clips_) == 3
    for i, clip in enumerate(clips_):
        for name, run, key in (("run", "run", "after"), ("modules", "modules", "after"), ("base", "run", "before")):
            video = methods[name](clip)
            assert video.shape == clip.videos["target"].shape
            error = (video - clip.videos["target"]).abs().mean().item()
            assert -error == pytest.approx(measured[run][key][i], abs=1e-5)
    assert measured["run"]["after"] != pytest.approx(measured["modules"]["after"], abs=1e-4)


def test_methods_may_be_called_as_runs_are(configure, tmp_path, recwarn):
    config = configure("run.folder=" + str(tmp_path / "wan2.1 sr"))
    train(config)
    (clip,) = HeldOutClips(config, 1)
    lora = tmp_path / "wan2.1 sr" / "lora"
    methods = restorers(config, {"wan2.1 sr": lora, "again": lora, "base": None})
    videos = {name: method(clip) for name, method in methods.items()}
    assert torch.equal(videos["wan2.1 sr"], videos["again"])
    assert not torch.equal(videos["again"], videos["base"])
    assert not [warning for warning in recwarn if "peft_config" in str(warning.message)]


def test_what_starts_from_the_target_is_no_method(configure):
    with pytest.raises(UsageError, match="would be given what it is to find"):
        restorers(configure("prediction.mode=denoise"), {"base": None})


def test_a_guided_model_is_not_compared_with_its_own_training(configure):
    config = configure("prediction.mode=denoise", "losses={d: {name: diffusion}}", "model.call.guidance_scale=3")
    with pytest.raises(UsageError, match=r"set model.call.guidance_scale=1"):
        train(config)


def test_a_clip_longer_than_the_window_is_restored_by_windows(configure, tmp_path):
    config = configure("data.clips.buckets=[[9, 16, 16]]", "prediction.overlap=2")
    (clip,) = HeldOutClips(config, 1)
    video = restorers(config, {"base": None})["base"](clip)
    assert video.shape == clip.videos["target"].shape == (9, 3, 16, 16)
    assert torch.isfinite(video).all()


def test_a_run_goes_on_as_it_would_have(configure, tmp_path):
    whole = configure("train.steps=4", f"run.folder={tmp_path}/whole")
    train(whole)
    train(configure("train.steps=2", f"run.folder={tmp_path}/parts"))
    train(configure("train.steps=4", f"run.folder={tmp_path}/parts"), resume=True)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.train=nowhere",), r"nowhere"),
        (("data.clips=null",), r"need clips: give data.clips"),
        (("losses.charbonnier.name=charbonier",), r"no loss is called 'charbonier'.*charbonnier"),
        (("losses.d={name: diffusion}",), r"a loss of outputs needs prediction.mode=denoise"),
        (("prediction.source=control",), r"the data has no role 'control'"),
        (("data.clips.degradation={name: blurr}",), r"no degradation is called 'blurr'; did you mean 'blur'"),
        (("data.clips.buckets=[[6, 16, 16]]",), r"would round num_frames=6"),
        (("data.clips.buckets=[[5, 16, 16], [5, 32, 16]]", "validation.batch=2"), r"set validation.batch=1"),
        (("data.clips.buckets=[[9000, 16, 16]]",), r"no clip can be cut"),
        (("losses.charbonnier.args={inside: 4.0}",), r"weigh a mask, but there is none"),
    ],
)
def test_what_is_wrong_is_said_before_training(configure, tmp_path, overrides, message):
    with pytest.raises(UsageError, match=message):
        train(configure(*overrides))
    assert not (tmp_path / "run" / "checkpoints").exists()


# --- shipped configs --------------------------------------------------------------------------------------------------

CONFIGS = ROOT / "configs"
write_clips = runpy.run_path(str(ROOT / "scripts" / "make_clips.py"))["write_clips"]
_CONFIGS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if load_config(path).data.clips is not None)
_STAND_INS = {"cogvideox": ("cogvideox", 9), "vace": ("wan_vace", 5)}
"""Of other models than Wan T2V: the tiny pipeline, and its least number of frames."""


def test_there_is_a_config_for_every_task():
    assert {"sr_x4", "inpaint", "inpaint_language", "enhance_render", "control"} <= set(_CONFIGS)


@pytest.mark.parametrize("name", _CONFIGS)
def test_two_steps_of_a_shipped_config(name, tmp_path):
    """With a tiny model of the same classes, small clips, and losses that need no checkpoint."""
    make, frames = next((stand_in for word, stand_in in _STAND_INS.items() if word in name), ("wan_t2v", 5))
    getattr(tiny_pipelines, make)().save_pretrained(tmp_path / "model")
    write_clips(tmp_path / "clips", 2, frames + 3, 32, seed=0, held_out=False)
    run = tmp_path / "run"
    config = load_config(
        CONFIGS / f"{name}.yaml",
        [
            f"run.folder={run}",
            f"model.name={tmp_path / 'model'}",
            *("model.dtype=float32", "model.vae_dtype=float32", "model.call.height=16", "model.call.width=16"),
            *(f"model.call.num_frames={frames}", "model.call.num_inference_steps=2"),
            *(f"data.{part}={tmp_path / 'clips'}" for part in ("train", "held_out")),
            *("data.clips.fps=null", "lora.targets=[to_q, to_v]", "lora.rank=2", "train.steps=2"),
            *("train.batch_size=2", "train.micro_batch=1", "validation.pairs=2", "validation.videos=1"),
            *("validation.batch=1", "validation.every=0"),
            *(["~losses.dists"] if "dists" in load_config(CONFIGS / f"{name}.yaml").losses else []),
        ],
    )
    train(config)
    training = rows(run)
    assert len(training) == 2
    assert all(row["grad_norm"] > 0 for row in training)

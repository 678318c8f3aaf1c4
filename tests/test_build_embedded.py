"""The script that trains the embedded pipeline: a tiny stage, and the real ones for a step each."""

import itertools
import json
import random
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)  # as Python does for a script there


def test_an_interrupted_stage_goes_on_as_if_it_had_never_stopped(tmp_path, monkeypatch):
    from embedded_stages import loop

    clock = itertools.count(0, 1000)  # a checkpoint after every step
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def stage(work, stop=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 1))
        losses = []

        def loss_of_step(step):
            if step == stop:
                raise KeyboardInterrupt
            loss = (model(torch.randn(32, 20)) - 1).square().mean()
            losses.append(loss.item())
            return loss, {}

        work.mkdir(exist_ok=True)
        return loop.train("toy", work, {"toy": model}, 80, 0.02, loss_of_step), model, losses

    average, model, losses = stage(tmp_path / "straight")
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "stopped", stop=30)
    resumed, model_resumed, rest = stage(tmp_path / "stopped")
    assert rest == losses[30:]
    for name, value in model.state_dict().items():
        assert torch.equal(model_resumed.state_dict()[name], value)
        assert torch.equal(resumed["toy"][name], average["toy"][name])
    loaded = loop.trained(tmp_path / "stopped", "toy", model).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in average["toy"].items())


def test_the_decoder_is_trained_on_latents_with_noise():
    from embedded_stages.decoder import with_noise

    torch.manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 5.0]).view(1, 3, 1, 1, 1)
    latents = 3 + scale * torch.randn(400, 3, 2, 16, 16)
    strength = (with_noise(latents) - latents).std((2, 3, 4)) / scale.flatten()
    torch.testing.assert_close(strength, strength.mean(1, keepdim=True).expand_as(strength), rtol=0.2, atol=0)
    assert strength.mean() == pytest.approx(0.15, rel=0.1)
    assert strength.min() < 0.01
    assert 0.28 < strength.max() < 0.33


def test_the_video_reward_is_trained_against_captions_that_differ_in_one_word():
    from embedded_stages.video_reward import WORDS, neighbours

    from chopgrad_align.data import procedural

    rng = random.Random(0)
    for _ in range(5):
        scene = procedural.random_scene(rng)
        others = neighbours(scene, rng)
        differing = [[kind for kind in WORDS if getattr(other, kind) != getattr(scene, kind)] for other in others]
        assert all(len(kinds) == 1 for kinds in differing)
        assert {kinds[0] for kinds in differing} == set(WORDS)
        assert not any(other.held_out for other in others)
        motions = [replace(scene, motion=motion) for motion in procedural.MOTIONS if motion != scene.motion]
        assert {other for other in others if other.motion != scene.motion} == {m for m in motions if not m.held_out}


def test_finer_patches_start_from_what_coarse_ones_mean():
    from diffusers import WanTransformer3DModel
    from embedded_stages import denoiser

    torch.manual_seed(0)
    coarse, fine = (
        WanTransformer3DModel(**denoiser.DENOISER_CONFIG | {"patch_size": (1, size, size)}) for size in (2, 1)
    )
    fine.load_state_dict(denoiser._on_single_latents(coarse.state_dict()))
    latents = torch.randn(1, denoiser.LATENT_CHANNELS, 2, 4, 4)
    blocks = latents.repeat_interleave(2, 3).repeat_interleave(2, 4)  # constant in every patch of the coarse one
    torch.testing.assert_close(fine.patch_embedding(latents), coarse.patch_embedding(blocks), rtol=1e-4, atol=1e-5)
    tokens = torch.randn(1, 3, 256)
    patches = coarse.proj_out(tokens).unflatten(-1, (4, denoiser.LATENT_CHANNELS))
    torch.testing.assert_close(fine.proj_out(tokens), patches.mean(-2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["vea"], "unknown stage vea; expected some of vae, "), (["export"], "run the stage 'latents' first")],
)
def test_what_cannot_be_run_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["build_embedded.py", *arguments, "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPTS / "build_embedded.py"), run_name="__main__")
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_every_stage_from_nothing_to_the_card(tmp_path, monkeypatch):
    from embedded_stages import decoder, denoiser, evaluate, export, latents, reward, vae, video_reward

    folder, work = tmp_path / "embedded", tmp_path / "work"
    monkeypatch.setattr(export, "EMBEDDED", folder)
    monkeypatch.setattr(evaluate, "EMBEDDED", folder)
    work.mkdir()
    vae.train_vae(work, 1)
    decoder.train_decoder(work, 1)
    reward.train_reward(work, 1)
    video_reward.train_video_reward(work, 1)
    latents.encode_latents(work, 20)
    denoiser.train_denoiser(work, 1)
    denoiser.train_finer_denoiser(work, 1)
    export.export(work, 0)
    evaluate.evaluate(work, 8)
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["videos"] == 8
    assert (work / "samples.png").is_file()
    assert f"{figures['megabytes']:.1f} MB" in (folder / "README.md").read_text()
    shipped = Path(export.__file__).parents[2] / "chopgrad_align" / "embedded"
    assert names(folder) == names(shipped)


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

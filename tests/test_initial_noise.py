"""Initial noise made otherwise, by the pipeline's own code, against the call that is given the same latents."""

import pytest
import tiny_pipelines
import tiny_runs
import torch

from chopgrad_align import UsageError
from chopgrad_align.sampling.initial_noise import OffsetNoise, starting_from
from chopgrad_align.sampling.predictions import Sample
from chopgrad_align.sampling.predictions.latents import frame_axis

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


@pytest.mark.parametrize("name", ["wan_t2v", "cogvideox", "svd"])
def test_offset_noise(name):
    pipe, seen = getattr(tiny_pipelines, name)(), []
    call = {**tiny_pipelines.CALLS[name], "output_type": "latent"}

    def recorded(noise, generator, axis):
        states = [one.get_state() for one in generator]
        made = OffsetNoise(0.5)(noise, generator, axis)
        seen.append((noise, made, states))
        return made

    with Sample(noise=recorded).prepare(pipe, {}, [3, 4], True, False):
        latents = pipe(**call, generator=generators()).frames
    [(noise, made, states)] = seen
    offset, frames = (made - noise) / 0.5, frame_axis(pipe)
    # One number for each video and channel, from the video's own generator.
    expected = torch.cat(
        [torch.randn(1, noise.shape[3 - frames], generator=torch.Generator().set_state(each)) for each in states]
    )
    torch.testing.assert_close(offset.amin((frames, 3, 4)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(offset.amax((frames, 3, 4)), expected, rtol=1e-4, atol=1e-4)
    if name != "svd":  # whose call draws for the images before
        assert torch.equal(pipe(**call, generator=generators(), latents=made).frames, latents)
    assert "prepare_latents" not in vars(pipe)


def test_what_cannot_be_replaced():
    pipe, call = tiny_pipelines.wan_t2v(), {**tiny_pipelines.CALLS["wan_t2v"], "output_type": "latent"}
    with starting_from(pipe, lambda noise, generator, axis: noise[:1], 2), pytest.raises(UsageError, match="shape of"):
        pipe(**call)
    given = torch.zeros(2, 4, 2, 4, 4)
    with starting_from(pipe, OffsetNoise(), 2), pytest.raises(UsageError, match="draws no initial noise"):
        pipe(**call, latents=given)
    with pytest.raises(UsageError, match="not known how object draws"), starting_from(object(), OffsetNoise(), 2):
        pass


def test_names(tmp_path):
    def noise(setting):
        return tiny_runs.config(tmp_path, tmp_path, f"model.noise={setting}").model.initial_noise()

    assert noise("{name: offset, args: {scale: 0.2}}") == OffsetNoise(0.2)
    with pytest.raises(UsageError, match=r"no noise is called 'ofset'.*offset"):
        noise("{name: ofset}")
    with pytest.raises(UsageError, match="which cannot be called"):
        noise("{name: 'builtins:dict'}")
    with pytest.raises(UsageError, match=r"model.dtype: gradients of activations fall below the range of float16"):
        tiny_runs.config(tmp_path, tmp_path, "model.dtype=float16")

"""The benchmark at its smallest, by its own script: what its figures must show on every machine."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from tiny_pipelines import wan_t2v
from tiny_vaes import hunyuan_video15_vae, wan_vae

from chopgrad_align.benchmark.cases import load_clips, losses, units_of
from chopgrad_align.benchmark.influence import exponential_fit, influence_of
from chopgrad_align.benchmark.options import option_rows
from chopgrad_align.benchmark.peers import PEERS
from chopgrad_align.benchmark.rows import EXACT, POLICIES, REFERENCE, Row, gradient, loss_of
from chopgrad_align.benchmark.speed import FORWARD
from chopgrad_align.data.video import write_video
from chopgrad_align.decoding.backprop import Exact, Truncated
from chopgrad_align.decoding.decode import decode

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_decode.py"
FRAMES, GROUPS, SIZES = 5, 2, ["16x16", "24x16"]
HOST = Row(Exact(checkpoint=True, cache="host")).name
BFLOAT16 = f"{Row(Exact(checkpoint=False)).name}, bfloat16"


@pytest.fixture(scope="module")
def bench():
    main = runpy.run_path(str(SCRIPT))["main"]
    return lambda *arguments: main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    wan_t2v().save_pretrained(folder)
    defaults = {"num_inference_steps": 2, "max_sequence_length": 16}
    (folder / "call_defaults.json").write_text(json.dumps(defaults))
    return folder


@pytest.fixture(scope="module")
def folder(bench, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    lengths = {"--frames": [FRAMES], "--memory-frames": [9], "--distances": range(GROUPS)}
    numbers = {
        "--count": [1],
        "--size": SIZES[:1],
        "--time-sizes": SIZES,
        "--probes": [1],
        "--repetitions": [2],
        "--options": ["bfloat16"],
    }
    options = [part for name, values in (lengths | numbers).items() for part in (name, *values)]
    bench("--vae", model, "--pipeline", model, "--device", "cpu", "--out", folder, *options)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "benchmark.json").read_text())


def test_every_row_is_there(results):
    ways = {*POLICIES, *PEERS, BFLOAT16}
    assert set(results["memory"]["peak_bytes"]) == set(POLICIES)
    assert set(results["memory"]["of_clip"]) == ways
    assert ways <= set(results["error"]["cosine"])
    assert list(results["speed"]) == SIZES
    for speed in results["speed"].values():
        assert set(speed["seconds"]) == {*ways, FORWARD}
        assert set(speed["goal"]) <= set(POLICIES)
        assert len(speed["goal"]) == 2
        assert speed["ratio"][REFERENCE] == 1
        assert all(min(times) > 0 and len(times) == 2 for times in speed["seconds"].values())


def test_names_of_rows_are_code():
    assert (REFERENCE, EXACT) == ("Full()", "Exact()")
    assert Row(Truncated(2, rows=4), fused=True).name == "Truncated(2, rows=4), fused"
    for name, row in POLICIES.items():
        policy = eval(name.removesuffix(", fused"), {type(row.policy).__name__: type(row.policy)})
        assert policy == row.policy


def test_memory_grows_with_the_frames_of_plain_autograd_and_not_with_those_of_the_recurrence(results):
    peaks = results["memory"]["peak_bytes"]
    assert results["memory"]["frames"] == [FRAMES, 9]
    short, long = peaks[REFERENCE]
    assert long > 1.5 * short
    short_host, long_host = peaks[HOST]
    pixels = 3 * 16 * 16 * 4 * 4  # bytes of four more frames
    assert long_host - short_host < 4 * pixels < (long - short) / 10


@pytest.mark.parametrize("kind", ["error", "lora_error"])
def test_exact_is_exact_and_the_longest_truncation_equals_it(results, kind):
    cosine, error = results[kind]["cosine"], results[kind]["relative_error"]
    assert len(cosine[EXACT]) == len(results[kind]["cases"]) == 2  # a clip, two losses
    for name in (EXACT, f"Truncated({GROUPS - 1})"):
        assert cosine[name] == pytest.approx([1, 1], abs=1e-6)
        assert error[name] == pytest.approx([0, 0], abs=1e-5)
    assert min(error["Truncated(0)"]) > 1e-3


def test_other_ways_are_not_the_exact_gradient(results):
    cosine = results["error"]["cosine"]
    assert cosine["first 3 latents (VideoX-Fun)"] == pytest.approx([1, 1])  # this clip has no more than three
    for name in PEERS.keys() - {"first 3 latents (VideoX-Fun)"}:
        assert max(map(abs, cosine[name])) < 0.9999, name


def test_the_page_shows_every_row_and_its_pictures(folder, results):
    page = (folder / "benchmark.md").read_text()
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == [f"benchmark_{name}.png" for name in ("error", "influence", "memory", "ways")]
    for text in [*pictures, *results["speed"][SIZES[0]]["seconds"], *results["memory"]["peak_bytes"]]:
        assert text in page
    assert "--size 16x16" in page


def test_a_run_is_never_overwritten_and_its_page_can_be_written_again(bench, folder, model, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench("--vae", model, "--out", folder)
    assert f"{folder} holds a benchmark already" in capsys.readouterr().err
    bench("--figures", folder / "benchmark.json", "--out", tmp_path)
    for name in ("benchmark.json", "benchmark.md"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert len(list(tmp_path.glob("*.png"))) == 4


@pytest.mark.parametrize("option", ["bfloat16", "channels_last_3d"])
def test_options_leave_the_vae_as_it_is_and_the_gradient_nearly(option):
    vae = wan_vae()
    latents = torch.randn(1, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    before = decode(vae, latents)
    target = torch.rand(3, before.shape[2], *before.shape[3:], generator=torch.Generator().manual_seed(1))
    loss = losses(target)["pixel"]
    exact = gradient(latents, lambda z: loss_of(decode(vae, z), loss))
    ((_, method),) = option_rows(vae, [option]).items()
    found = method(vae, latents, loss)
    assert torch.equal(decode(vae, latents), before)
    assert found.dtype == exact.dtype
    assert torch.cosine_similarity(found.flatten(), exact.flatten(), 0) > 0.99


def test_influence_is_the_norm_of_the_jacobian():
    vae = wan_vae().double()
    latents = torch.randn(1, 4, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    last = units_of(vae, latents)[-1].frames
    squares = torch.zeros(3)  # of the derivatives of the last group's pixels, by central differences, for each latent
    step = 1e-5
    for index in range(latents.numel()):
        change = torch.zeros_like(latents)
        change.view(-1)[index] = step
        apart = decode(vae, latents + change) - decode(vae, latents - change)
        squares[index % 3] += (apart[:, :, last] / (2 * step)).square().mean((0, 2, 3, 4)).mean()
    estimate = influence_of(vae, latents, probes=20)
    assert estimate[2] == pytest.approx(squares[0].sqrt().item(), rel=0.3)


def test_the_fit_finds_an_exponential():
    fit = exponential_fit([[3 * 0.5**d for d in range(6)], [3 * 0.5**d for d in range(4)]])
    assert fit == pytest.approx({"scale": 3, "factor": 0.5, "r_squared": 1})


def test_losses_add_up_over_pieces():
    pixels, target = torch.rand(1, 3, 5, 8, 8), torch.rand(3, 5, 8, 8)
    for loss in losses(target).values():
        whole = loss(pixels, slice(0, 5))
        pieces = loss(pixels[:, :, :2], slice(0, 2)) + loss(pixels[:, :, 2:], slice(2, 5))
        torch.testing.assert_close(pieces, whole)


def test_a_decoder_without_a_recurrence_has_one_unit_a_latent_frame():
    vae = hunyuan_video15_vae()
    latents = torch.randn(1, 4, 3, 2, 2)
    units = units_of(vae, latents)
    frames = decode(vae, latents).shape[2]
    assert [unit.latents for unit in units] == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert [i for unit in units for i in range(frames)[unit.frames]] == list(range(frames))
    loss = losses(torch.rand(3, frames, 8, 8))["colour"]
    for name, way in {**PEERS, "exact": Row(Exact())}.items():
        assert way(vae, latents, loss).isfinite().all(), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vae", "nowhere"], "--vae: there is no folder nowhere"),
        (["--repetitions", 1], "--repetitions 1: expected 2 or more"),
        (["--clips", "CLIPS", "--frames", 9], "short.mp4 has 5 frames"),
        (["--clips", "EMPTY"], "holds no videos"),
        (["--clips", "BROKEN"], "--clips: cannot read broken.mp4"),
        (["--figures", "BROKEN/broken.mp4"], "--figures: cannot read"),
        (["--frames", 7], "choose --frames and --size"),
    ],
    ids=["folder", "repetitions", "short", "empty", "broken", "figures", "size"],
)
def test_mistakes_are_told_in_words(bench, model, tmp_path, capsys, arguments, message):
    write_video(tmp_path / "clips" / "short.mp4", torch.rand(5, 3, 16, 16), fps=8)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "broken.mp4").write_bytes(b"no video")
    places = {"CLIPS": "clips", "EMPTY": "empty", "BROKEN": "broken", "BROKEN/broken.mp4": "broken/broken.mp4"}
    found = [tmp_path / places[argument] if argument in places else argument for argument in arguments]
    given = ["--vae", model, "--size", "16x16", *found]
    with pytest.raises(SystemExit) as stop:
        bench(*given, "--out", tmp_path / "out")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_middle_of_real_clips_is_read_and_cut_to_size(tmp_path):
    grey = torch.linspace(0, 1, 9)[:, None, None, None].expand(9, 3, 24, 48)
    write_video(tmp_path / "a.mp4", grey, fps=8)
    (clip,) = load_clips(tmp_path, 3, 5, (16, 16)).values()
    assert clip.shape == (3, 5, 16, 16)
    torch.testing.assert_close(clip[:, :, 8, 8].mean(0), torch.linspace(0, 1, 9)[2:7], atol=0.02, rtol=0)

"""Every known decoder on tiny random weights: bits, gradients, memory, state; with tiles, slices and single frames."""

import re
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny_vaes
import torch
from gradients import ROUNDING, assert_same, assert_same_gradient, gradient, relative_error, weighted
from torch import Tensor, nn

from chopgrad_align import Exact, Full, Truncated, UsageError, decode, decode_loss
from chopgrad_align.common.storage_count import StorageCount
from chopgrad_align.decoding import decoders
from chopgrad_align.decoding.decoders.base import WholeDecoder, stateless

POLICIES = [Exact(), Exact(checkpoint=False), Truncated(99), Full()]


@dataclass(frozen=True)
class Case:
    make: str
    shape: tuple[int, ...]
    arguments: dict = field(default_factory=dict)
    decode_kwargs: dict = field(default_factory=dict)
    tiling: dict | None = None
    slicing: bool = False

    @property
    def time_axis(self) -> int:
        """Of the pixels."""
        return 0 if len(self.shape) == 4 else 1 if self.make == "allegro_vae" else 2

    def build(self, dtype=torch.float32, shape=None):
        vae = getattr(tiny_vaes, self.make)(**self.arguments)
        vae = vae if dtype == torch.float32 else vae.to(dtype)
        if self.tiling is not None:
            vae.enable_tiling()
            for name, value in self.tiling.items():
                assert getattr(vae, name) is not None
                setattr(vae, name, value)
        if self.slicing:
            vae.enable_slicing()
        torch.manual_seed(1)
        return vae, torch.randn(shape or self.shape, dtype=dtype, requires_grad=True)

    def reference(self, vae, latents) -> Tensor:
        torch.manual_seed(5)
        return vae.decode(latents, **self.decode_kwargs).sample

    def decode(self, vae, latents, *args, **kwargs) -> Tensor:
        torch.manual_seed(5)
        return decode(vae, latents, *args, **kwargs, **self.decode_kwargs)


def strided(size: tuple[int, int], stride: tuple[int, int]) -> dict[str, int]:
    """In pixels, height and width unlike each other."""
    return {
        "tile_sample_min_height": size[0],
        "tile_sample_min_width": size[1],
        "tile_sample_stride_height": stride[0],
        "tile_sample_stride_width": stride[1],
    }


OVERLAPPING = {
    "tile_sample_min_height": 12,
    "tile_sample_min_width": 16,
    "tile_latent_min_height": 3,
    "tile_latent_min_width": 4,
}
COGVIDEOX_TILES = {**OVERLAPPING, "tile_overlap_factor_height": 1 / 3, "tile_overlap_factor_width": 1 / 4}
IMAGE_TILES = {"tile_sample_min_size": 8, "tile_latent_min_size": 4}
TIMESTEP = {"temb": torch.tensor([0.05, 0.3])}

WHOLE = {  # one of each kind, and what a setting changes
    "wan2.1": Case("wan_vae", (1, 4, 3, 4, 3)),
    "wan2.2": Case("wan_vae", (1, 4, 3, 3, 4), {"residual": True}),
    "qwen-image": Case("qwen_image_vae", (1, 4, 3, 4, 3)),
    "cogvideox": Case("cogvideox_vae", (1, 4, 5, 4, 3)),
    "mochi": Case("mochi_vae", (1, 4, 3, 4, 3)),
    "mochi, frame-wise": Case("mochi_vae", (1, 4, 5, 4, 3), {"framewise": True}),
    "hunyuan-video": Case("hunyuan_video_vae", (1, 4, 3, 4, 3)),
    "hunyuan-video 1.5": Case("hunyuan_video15_vae", (1, 4, 3, 4, 3)),
    "ltx": Case("ltx_vae", (1, 8, 3, 4, 3)),
    "ltx, noise and timestep": Case("ltx_vae", (2, 8, 3, 4, 3), {"conditioned": True}, TIMESTEP),
    "ltx2": Case("ltx2_vae", (1, 8, 3, 4, 3)),
    "ltx2, noise and timestep": Case("ltx2_vae", (2, 8, 3, 4, 3), {"conditioned": True}, {**TIMESTEP, "causal": True}),
    "cosmos": Case("cosmos_vae", (1, 4, 3, 4, 3)),
    "allegro": Case("allegro_vae", (1, 4, 4, 4, 4)),
    "magvit": Case("magvit_vae", (1, 4, 4, 4, 3)),
    "magvit, norms over time": Case("magvit_vae", (1, 4, 4, 4, 3), {"spatial_group_norm": False}),
    "kvae": Case("kvae_video_vae", (1, 4, 7, 2, 2)),
    "kandinsky6": Case("kandinsky6_sr_vae", (1, 4, 7, 2, 2)),
    "svd": Case("temporal_vae", (3, 4, 4, 3), decode_kwargs={"num_frames": 3}),
    "images": Case("image_vae", (3, 4, 4, 3)),
}
SHAPES = {
    "wan, one frame": Case("wan_vae", (2, 4, 1, 4, 3)),
    "qwen-image, one frame": Case("qwen_image_vae", (2, 4, 1, 4, 3)),
    "cogvideox, one frame": Case("cogvideox_vae", (2, 4, 1, 4, 4)),
    "cogvideox, even": Case("cogvideox_vae", (2, 4, 4, 4, 3)),
    "mochi, one frame": Case("mochi_vae", (2, 4, 1, 4, 3)),
    "mochi, groups without caches": Case("mochi_vae", (1, 4, 5, 4, 3), tiling={"use_framewise_decoding": True}),
    "mochi, frame-wise, one frame": Case("mochi_vae", (2, 4, 1, 4, 3), {"framewise": True}),
    "mochi, frame-wise, even": Case("mochi_vae", (2, 4, 4, 4, 3), {"framewise": True}),
    "hunyuan-video, one frame": Case("hunyuan_video_vae", (2, 4, 1, 4, 3)),
    "hunyuan-video, tiles over time": Case("hunyuan_video_vae", (2, 4, 7, 4, 3)),
    "hunyuan-video, even tiles over time": Case("hunyuan_video_vae", (1, 4, 4, 4, 3)),
    "hunyuan-video 1.5, one frame": Case("hunyuan_video15_vae", (1, 4, 1, 4, 3)),
    "hunyuan-video 1.5, even": Case("hunyuan_video15_vae", (1, 4, 4, 4, 3)),
    "ltx, one frame": Case("ltx_vae", (2, 8, 1, 4, 3)),
    "ltx2, one frame": Case("ltx2_vae", (2, 8, 1, 4, 3)),
    "cosmos, one frame": Case("cosmos_vae", (2, 4, 1, 4, 3)),
    "cosmos, even": Case("cosmos_vae", (2, 4, 4, 4, 3)),
    "allegro, a rest of frames": Case("allegro_vae", (1, 4, 7, 5, 4)),
    "magvit, one frame": Case("magvit_vae", (2, 4, 1, 4, 3)),
    "kvae, one frame": Case("kvae_video_vae", (2, 4, 1, 2, 2)),
    "kvae, a rest of one frame": Case("kvae_video_vae", (1, 4, 6, 2, 2)),
    "kandinsky6, one frame": Case("kandinsky6_sr_vae", (2, 4, 1, 2, 2)),
    "kandinsky6, a rest of one frame": Case("kandinsky6_sr_vae", (1, 4, 6, 2, 2)),
}
TILES = {
    "wan2.1": Case("wan_vae", (1, 4, 2, 4, 3), tiling=strided((12, 8), (8, 4))),
    "wan2.2": Case("wan_vae", (1, 4, 2, 3, 4), {"residual": True}, tiling=strided((16, 24), (8, 16))),
    "qwen-image": Case("qwen_image_vae", (1, 4, 2, 4, 3), tiling=strided((12, 8), (8, 4))),
    "cogvideox": Case("cogvideox_vae", (1, 4, 5, 4, 5), tiling=COGVIDEOX_TILES),
    "mochi": Case("mochi_vae", (1, 4, 2, 4, 4), tiling=strided((6, 4), (4, 2))),
    "mochi, frame-wise": Case("mochi_vae", (1, 4, 5, 4, 4), {"framewise": True}, tiling=strided((6, 4), (4, 4))),
    "hunyuan-video": Case("hunyuan_video_vae", (1, 4, 3, 5, 4), tiling=strided((6, 4), (4, 2))),
    "hunyuan-video, and over time": Case("hunyuan_video_vae", (1, 4, 5, 5, 4), tiling=strided((6, 4), (4, 2))),
    "hunyuan-video 1.5": Case(
        "hunyuan_video15_vae", (1, 4, 3, 4, 5), tiling={**OVERLAPPING, "tile_overlap_factor": 1 / 3}
    ),
    "ltx": Case("ltx_vae", (1, 8, 2, 4, 3), tiling=strided((12, 8), (8, 4))),
    "ltx, and over time": Case(
        "ltx_vae",
        (2, 8, 5, 4, 3),
        {"conditioned": True},
        TIMESTEP,
        tiling={**strided((12, 8), (8, 4)), "use_framewise_decoding": True},
    ),
    "ltx2, and over time": Case(
        "ltx2_vae", (1, 8, 6, 4, 6), tiling={**strided((12, 16), (8, 8)), "use_framewise_decoding": True}
    ),
    "cosmos, which has none": Case("cosmos_vae", (1, 4, 2, 4, 3), tiling=strided((6, 4), (4, 2))),
    "allegro": Case("allegro_vae", (1, 4, 6, 4, 7)),
    "magvit": Case("magvit_vae", (1, 4, 3, 4, 3), tiling=strided((12, 8), (8, 4))),
    "magvit, not needed by its own measure": Case("magvit_vae", (1, 4, 2, 3, 2), tiling=strided((8, 12), (4, 8))),
    "images": Case("image_vae", (2, 4, 6, 5), tiling=IMAGE_TILES),
}
SLICES = {
    "wan2.1 in tiles": Case("wan_vae", (2, 4, 2, 4, 3), tiling=strided((12, 8), (8, 4)), slicing=True),
    "qwen-image": Case("qwen_image_vae", (2, 4, 3, 4, 3), slicing=True),
    "mochi": Case("mochi_vae", (2, 4, 2, 4, 3), slicing=True),
    "hunyuan-video, tiles over time": Case("hunyuan_video_vae", (2, 4, 5, 4, 3), slicing=True),
    "hunyuan-video 1.5": Case("hunyuan_video15_vae", (2, 4, 2, 4, 3), slicing=True),
    "ltx": Case("ltx_vae", (2, 8, 2, 4, 3), slicing=True),
    "ltx2": Case("ltx2_vae", (2, 8, 2, 4, 3), slicing=True),
    "cosmos": Case("cosmos_vae", (2, 4, 2, 4, 3), slicing=True),
    "allegro": Case("allegro_vae", (2, 4, 4, 4, 5), slicing=True),
    "magvit in tiles": Case("magvit_vae", (2, 4, 2, 4, 3), tiling=strided((12, 8), (8, 4)), slicing=True),
    "kvae": Case("kvae_video_vae", (2, 4, 2, 2, 2), slicing=True),
    "images in tiles": Case("image_vae", (2, 4, 6, 5), tiling=IMAGE_TILES, slicing=True),
}
EACH = WHOLE | {
    f"{name}, in tiles": TILES[name]
    for name in ("wan2.2", "cogvideox", "hunyuan-video, and over time", "ltx2, and over time", "allegro", "images")
}
ALL = {
    f"{kind}: {name}": case
    for kind, cases in [("whole", WHOLE), ("shapes", SHAPES), ("tiles", TILES), ("slices", SLICES)]
    for name, case in cases.items()
}


def over(cases: dict[str, Case]):
    ids = [re.sub(r"[^\w.]+", "_", name) for name in cases]
    return pytest.mark.parametrize("case", cases.values(), ids=ids)


@over(ALL)
def test_pixels_bit_for_bit_and_the_gradient_of_plain_autograd(case):
    vae, latents = case.build()
    expected = case.reference(vae, latents)
    expected_gradient = gradient(weighted(expected), latents)
    assert expected_gradient.norm() > 0
    in_pieces = case.tiling is not None or case.slicing  # each of which is decoded by itself
    for backprop in (Exact(), Full()) if in_pieces else POLICIES:
        pixels = case.decode(vae, latents, backprop).mul_(1)  # it is no view, which may not be written into
        assert torch.equal(pixels, expected), backprop
        assert relative_error(gradient(weighted(pixels), latents), expected_gradient) < ROUNDING, backprop
    with torch.no_grad():
        assert torch.equal(case.decode(vae, latents), expected)


@over(EACH)
def test_the_gradient_in_float64(case, full_precision):
    vae, latents = case.build(torch.float64)
    assert_same_gradient(case.decode(vae, latents), case.reference(vae, latents), latents, tolerance=1e-10)


@over(EACH)
def test_weights_of_the_decoder_get_their_gradient(case):
    vae, latents = case.build()
    weights = [*vae.decoder.parameters()]
    for weight in weights:
        weight.requires_grad_()
    expected = torch.autograd.grad(weighted(case.reference(vae, latents)), weights, allow_unused=True)
    got = torch.autograd.grad(weighted(case.decode(vae, latents)), weights, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item() + 1e-6)


@over(EACH)
def test_chosen_frames(case):
    vae, latents = case.build()
    everything = case.decode(vae, latents)
    index = torch.tensor([everything.shape[case.time_axis] - 1, 0])
    expected = everything.index_select(case.time_axis, index)
    some = case.decode(vae, latents, frames=[-1, 0])
    if case.make == "image_vae":  # decoded in other batches than without a choice
        torch.testing.assert_close(some, expected)
    else:
        assert torch.equal(some, expected)
    assert_same_gradient(some, expected, latents)


@over(EACH)
def test_streamed_loss(case):
    vae, latents = case.build()
    pixels = case.decode(vae, latents)
    target = torch.rand_like(pixels)

    def frame_loss(part, frames):
        return (part - target[(*(slice(None),) * case.time_axis, frames)]).square().sum()

    torch.manual_seed(5)
    loss = decode_loss(vae, latents, frame_loss, Exact(), **case.decode_kwargs)
    expected = (pixels - target).square().sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert relative_error(gradient(loss, latents), gradient(expected, latents)) < ROUNDING


def peak(case: Case, shape: tuple[int, ...], backprop) -> float:
    vae, latents = case.build(shape=shape)
    with StorageCount() as storage:
        case.decode(vae, latents, backprop).sum().backward()
    return storage.peak


@over(WHOLE | {"wan2.2, in tiles": TILES["wan2.2"]})
def test_peak_memory_is_far_below_plain_autograds(case):
    scale = 2 if case.tiling is None else 1
    shape = (*case.shape[:-2], *(scale * side for side in case.shape[-2:]))
    assert peak(case, shape, Exact()) < 0.7 * peak(case, shape, Full())


def state(vae) -> list:
    """All that modules hold besides weights and submodules."""
    own = ("_parameters", "_buffers", "_modules", "_forward_pre_hooks")
    return [
        {
            key: id(value) if isinstance(value, Tensor) else repr(value)
            for key, value in vars(m).items()
            if key not in own
        }
        for m in vae.modules()
    ]


@over(WHOLE)
def test_the_vae_stays_as_it_was_also_after_an_exception(case):
    vae, latents = case.build()
    before = state(vae)
    expected = case.decode(vae, latents).sum()
    expected.backward()
    assert state(vae) == before

    def fail(module, args):
        if next(turns) == 0:
            raise RuntimeError("out of luck")

    last = [m for m in vae.decoder.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)][-2]
    handle = last.register_forward_pre_hook(fail)
    for countdown in (0, 1):  # in the first pass, and when something runs for the second time
        turns = iter(range(countdown, -99, -1))
        with pytest.raises(RuntimeError, match="out of luck"):
            case.decode(vae, latents).sum().backward()
        assert state(vae) == before
    handle.remove()
    assert torch.equal(case.decode(vae, latents).sum(), expected)


def test_all_known_decoders_are_tested():
    tested = {type(case.build()[0]).__name__ for case in WHOLE.values()}
    assert tested == set(decoders._KNOWN)


@pytest.mark.slow
def test_the_table_of_the_documentation(tmp_path, monkeypatch):
    script, output = Path(__file__).parents[1] / "scripts" / "table_decoders.py", tmp_path / "table.md"
    command = f"{script} --only AutoencoderKLCosmos AutoencoderKLMagvit --size 64x64 --frames 9 17 --output {output}"
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: None)
    runpy.run_path(str(script), run_name="__main__")
    cosmos, magvit = (line.split(" | ") for line in output.read_text().splitlines()[-2:])
    assert cosmos[:3] == ["| AutoencoderKLCosmos", "whole", "1"]
    assert magvit[:3] == ["| AutoencoderKLMagvit", "recurrence", "5"]


def test_noise_is_drawn_as_by_the_model_and_not_in_the_backward_pass():
    case = WHOLE["ltx, noise and timestep"]
    vae, latents = case.build()
    pixels = case.reference(vae, latents)
    after = torch.get_rng_state()
    got = case.decode(vae, latents)
    assert torch.equal(torch.get_rng_state(), after)
    gradient(got.sum(), latents)
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(6)
    assert not torch.equal(vae.decode(latents, **case.decode_kwargs).sample, pixels)


def test_saturated_pixels_of_tiles_can_pass_the_gradient_of_no_clamp():
    vae, latents = TILES["wan2.1"].build()
    expected = gradient(weighted(decode(vae, latents)), latents)
    vae.decoder.conv_out.bias.data.fill_(9.0)  # every pixel is clamped; the Jacobian before the clamp is the same
    assert gradient(weighted(decode(vae, latents)), latents).abs().max() == 0
    passed = decode(vae, latents, Exact(saturated="pass"))
    assert relative_error(gradient(weighted(passed), latents), expected) < ROUNDING


def test_images_of_a_video_in_tiles():
    vae, _ = TILES["images"].build()
    latents = torch.randn(2, 4, 3, 6, 5, requires_grad=True)
    expected = torch.stack([vae.decode(latents[:, :, i]).sample for i in range(3)], 2)
    assert_same(decode(vae, latents), expected, latents)


def test_slices_of_magvit_start_from_clean_caches():
    """The model's own hands the caches of one sample to the next, and fails over the frames that this adds."""
    vae, latents = Case("magvit_vae", (2, 4, 3, 4, 3)).build()
    expected = torch.cat([vae.decode(z).sample for z in latents.split(1)])
    vae.enable_slicing()
    assert torch.equal(decode(vae, latents), expected)


def test_caches_that_an_exception_left_on_a_model_do_not_matter():
    vae, latents = WHOLE["magvit"].build()
    expected = vae.decode(latents).sample
    vae.decoder(latents)  # leaves its caches on the modules
    assert torch.equal(decode(vae, latents), expected)


def test_wrong_uses_are_refused_in_words():
    vae, latents = WHOLE["ltx, noise and timestep"].build()
    with pytest.raises(UsageError, match="conditioned on a timestep; pass temb="):
        decode(vae, latents)
    with pytest.raises(UsageError, match=r"pass temb.detach\(\)"):
        decode(vae, latents, temb=torch.ones(2, requires_grad=True))
    vae.enable_slicing()
    with pytest.raises(UsageError, match=r"call vae.disable_slicing\(\)"):
        decode(vae, latents, temb=torch.ones(2))
    vae, latents = WHOLE["allegro"].build(shape=(2, 4, 4, 4, 4))
    with pytest.raises(UsageError, match="enable_slicing"):
        decode(vae, latents)
    with pytest.raises(UsageError, match=r"\(3, 4, 4\) .* are smaller than a tile .*\(4, 4, 4\)"):
        decode(vae, latents[:1, :, :3])
    vae.disable_tiling()
    with pytest.raises(UsageError, match="enable_tiling"):
        decode(vae, latents[:1])


class Mean(nn.Module):
    """A decoder that is not in diffusers: two layers, of which the second sees all frames, and a gain."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv3d(4, 8, 3, padding=1)
        self.conv_out = nn.Conv3d(8, 3, 3, padding=1)
        self.gain = nn.Parameter(torch.tensor(0.5))

    def decode(self, latents):
        x = self.conv_in(latents)
        return self.gain * self.conv_out(x - x.mean(2, keepdim=True))


class MeanDecoder(WholeDecoder):
    def __init__(self, vae, latents):
        super().__init__(vae)

    def count_frames(self, latent_frames):
        return latent_frames

    def blocks(self, index):
        vae = self.vae
        return [stateless(vae.conv_in), stateless(lambda x: vae.conv_out(x - x.mean(2, keepdim=True)))]

    def epilogue(self, output, clamp):
        return self.vae.gain * output


def test_a_new_decoder_is_one_small_class(monkeypatch):
    vae, latents = Mean(), torch.randn(1, 4, 3, 4, 4, requires_grad=True)
    with pytest.raises(UsageError, match=r"no decoder is known for Mean; known are AutoencoderKL, .*register"):
        decode(vae, latents)
    monkeypatch.setattr(decoders, "_KNOWN", dict(decoders._KNOWN))
    decoders.register_decoder(Mean, MeanDecoder)
    for backprop in POLICIES:
        assert_same(decode(vae, latents, backprop), vae.decode(latents), latents)
        of_gain, expected = (
            gradient(weighted(p), vae.gain) for p in (decode(vae, latents, backprop), vae.decode(latents))
        )
        torch.testing.assert_close(of_gain, expected)
    assert torch.equal(decode(vae, latents, frames=[1]), vae.decode(latents)[:, :, 1:2])

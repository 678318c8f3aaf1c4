"""Decoding: pixels bit for bit, gradients against plain autograd, the full Jacobian and finite differences."""

from dataclasses import replace

import pytest
import tiny_vaes
import torch
from gradients import ROUNDING, assert_same, gradient, relative_error, weighted
from torch import Tensor, nn

from chopgrad_align import Exact, Full, Truncated, UsageError, decode, decode_loss
from chopgrad_align.common.storage_count import StorageCount

EXACT = [
    Exact(),
    Exact(checkpoint=False),
    Exact(cache="host"),
    Exact(cache="recompute"),
    Exact(cache="recompute", checkpoint=False),
    Exact(memory_efficient_layers=False),
    Exact(checkpoint=False, memory_efficient_layers=False),
    Exact(cache="host", rows=3),
]


def over(policies):
    return pytest.mark.parametrize("backprop", policies, ids=map(short, policies))


def short(policy):
    """An id that `-k` can pick, such as `exact`, `recompute` or `truncated1`."""
    name = type(policy).__name__.lower()
    return (
        f"{name}{policy.distance}"
        if isinstance(policy, Truncated)
        else getattr(policy, "cache", name).replace("device", name)
    )


CASES = {
    "wan": (tiny_vaes.wan_vae, {}, (2, 4, 4, 3, 2), {}),
    "wan_deep": (tiny_vaes.wan_vae, {"spatial_levels": 3}, (1, 4, 3, 2, 1), {}),
    "wan2_2": (tiny_vaes.wan_vae, {"residual": True}, (1, 4, 4, 2, 3), {}),
    "one_frame": (tiny_vaes.wan_vae, {}, (1, 4, 1, 4, 4), {}),
    "cogvideox_odd": (tiny_vaes.cogvideox_vae, {}, (2, 4, 5, 4, 4), {}),
    "cogvideox_even": (tiny_vaes.cogvideox_vae, {}, (1, 4, 4, 4, 4), {}),
    "images": (tiny_vaes.image_vae, {}, (3, 4, 4, 5), {}),
    "svd": (tiny_vaes.temporal_vae, {}, (6, 4, 4, 4), {"num_frames": 3}),
}


@pytest.fixture(params=CASES)
def case(request):
    make, arguments, shape, decode_kwargs = CASES[request.param]
    vae = make(**arguments)
    torch.manual_seed(1)
    return vae, torch.randn(shape, requires_grad=True), decode_kwargs


def test_pixels_bit_for_bit_and_the_exact_gradient(case):
    vae, latents, decode_kwargs = case
    expected = vae.decode(latents, **decode_kwargs).sample
    of_expected = gradient(weighted(expected), latents)
    for backprop in (Full(), *EXACT, Truncated(50)):
        pixels = decode(vae, latents, backprop, **decode_kwargs)
        assert torch.equal(pixels, expected), backprop
        assert relative_error(gradient(weighted(pixels), latents), of_expected) < ROUNDING, backprop
    with torch.no_grad():
        for backprop in (Full(), Exact(), Exact(cache="host")):
            assert torch.equal(decode(vae, latents, backprop, **decode_kwargs), expected), backprop


def test_exact_gradient_in_float64(case, full_precision):
    vae, latents, decode_kwargs = case
    vae, latents = vae.double(), latents.detach().double().requires_grad_()
    expected = gradient(weighted(vae.decode(latents, **decode_kwargs).sample), latents)
    for backprop in EXACT:
        found = gradient(weighted(decode(vae, latents, backprop, **decode_kwargs)), latents)
        assert relative_error(found, expected) < 1e-10, backprop


def test_gradient_against_finite_differences(full_precision):
    vae = tiny_vaes.wan_vae().double()
    latents = torch.randn(1, 4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(latents)
    slope = (gradient(weighted(decode(vae, latents)), latents) * direction).sum()
    with torch.no_grad():
        high, low = (weighted(decode(vae, latents + h * direction)) for h in (1e-6, -1e-6))
    torch.testing.assert_close(slope, (high - low) / 2e-6, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("make", "frames", "groups"), [("wan_vae", 4, 4), ("cogvideox_vae", 7, 3)], ids=["wan", "cogvideox"]
)
def test_truncation_equals_the_band_masked_jacobian_for_every_distance(make, frames, groups, full_precision):
    vae = getattr(tiny_vaes, make)().double()
    latents = torch.randn(1, 4, frames, 1, 1, dtype=torch.float64, requires_grad=True)
    spans = _groups(vae, latents)
    assert len(spans) == groups
    pixels = vae.decode(latents).sample
    cotangent = torch.randn_like(pixels)
    for distance in range(groups + 1):
        expected = torch.zeros_like(latents)
        for i, (_, shown) in enumerate(spans):
            # Row block i of the Jacobian, pulled back by the cotangent of its pixels, and cut outside the band.
            row = torch.autograd.grad(pixels[:, :, shown], latents, cotangent[:, :, shown], retain_graph=True)[0]
            for j, (source, _) in enumerate(spans):
                if 0 <= i - j <= distance:
                    expected[:, :, source] += row[:, :, source]
        for cache in ("device", "host", "recompute") if distance == 2 else ("device",):
            got = torch.autograd.grad(decode(vae, latents, Truncated(distance, cache=cache)), latents, cotangent)[0]
            assert relative_error(got, expected) < 1e-10
    exact = torch.autograd.grad(decode(vae, latents, Exact()), latents, cotangent)[0]
    widest = torch.autograd.grad(decode(vae, latents, Truncated(groups - 1)), latents, cotangent)[0]
    assert relative_error(widest, exact) < 1e-10
    nearest = torch.autograd.grad(decode(vae, latents, Truncated(0)), latents, cotangent)[0]
    assert relative_error(nearest, exact) > 1e-3  # or the test would show nothing


def _groups(vae, latents) -> list[tuple[slice, slice]]:
    """Which latent frames and pixel frames belong together, found by asking the model: which pixels exist when."""
    from diffusers import AutoencoderKLWan

    size = 1 if isinstance(vae, AutoencoderKLWan) else 2
    count = latents.shape[2]
    ends = [*range(size + count % size, count, size), count]
    spans, start, shown = [], 0, 0
    for end in ends:
        frames = vae.decode(latents[:, :, :end]).sample.shape[2]
        spans.append((slice(start, end), slice(shown, frames)))
        start, shown = end, frames
    return spans


@over([Exact(), Exact(cache="recompute"), Truncated(1), Truncated(0), Full()])
def test_streamed_loss_equals_the_loss_of_decoded_pixels(case, backprop):
    vae, latents, decode_kwargs = case
    axis = 0 if latents.dim() == 4 else 2
    with torch.no_grad():
        target = torch.rand_like(decode(vae, latents, **decode_kwargs))

    def frame_loss(pixels, frame_index):
        at = (*(slice(None),) * axis, frame_index)
        return (pixels - target[at]).square().sum()

    pixels = decode(vae, latents, backprop, **decode_kwargs)
    expected = (pixels - target).square().sum()
    loss = decode_loss(vae, latents, frame_loss, backprop, **decode_kwargs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert relative_error(gradient(3 * loss, latents), gradient(3 * expected, latents)) < ROUNDING


@over([Exact(), Exact(cache="recompute"), Truncated(9), Full()])
def test_weights_of_the_decoder_get_their_exact_gradient(backprop):
    vae = tiny_vaes.wan_vae(residual=True).double()
    latents = torch.randn(1, 4, 3, 4, 4, dtype=torch.float64)  # needs no gradient, nor does the prologue
    weights = [*vae.decoder.parameters()]
    for weight in weights:
        weight.requires_grad_()
    expected = torch.autograd.grad(weighted(vae.decode(latents).sample), weights)
    got = torch.autograd.grad(weighted(decode(vae, latents, backprop)), weights)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-6  # the decoder upsamples in float32


def test_fused_loss_gives_weights_the_gradient_of_truncation():
    vae = tiny_vaes.wan_vae()
    weight = vae.decoder.conv_in.weight.requires_grad_()
    latents = torch.randn(1, 4, 3, 4, 4, requires_grad=True)
    fused = decode_loss(vae, latents, lambda pixels, _: pixels.square().sum(), Truncated(0))
    plain = decode(vae, latents, Truncated(0)).square().sum()
    for source in (weight, latents):
        a, b = (torch.autograd.grad(loss, source, retain_graph=True)[0] for loss in (fused, plain))
        assert relative_error(a, b) < ROUNDING


@over([Exact(), Exact(cache="recompute"), Truncated(1), Truncated(0)])
def test_frame_subsets(backprop):
    vae = tiny_vaes.wan_vae()
    latents = torch.randn(1, 4, 3, 2, 2, requires_grad=True)
    pixels = decode(vae, latents, backprop)
    for frames in (slice(None), slice(3, 6), [0], [7, 2, 2], [-1, -9], slice(0, None, 4), range(6, 2, -3)):
        expected = pixels[:, :, list(frames) if not isinstance(frames, slice) else frames]
        some = decode(vae, latents, backprop, frames=frames)
        assert torch.equal(some, expected), frames
        of_expected = torch.autograd.grad(weighted(expected), latents, retain_graph=True)[0]
        assert relative_error(gradient(weighted(some), latents), of_expected) < ROUNDING, frames


@pytest.mark.parametrize(
    ("frames", "calls"), [([0], 1), ([4], 2), ([0, 9], 4), (None, 4)], ids=["first", "second", "ends", "all"]
)
def test_frame_subsets_skip_later_groups(frames, calls):
    vae = tiny_vaes.wan_vae()
    count = 0

    def seen(module, args):
        nonlocal count
        count += 1

    vae.decoder.conv_in.register_forward_pre_hook(seen)
    with torch.no_grad():
        decode(vae, torch.randn(1, 4, 4, 4, 4), frames=frames)
    assert count == calls


def test_frame_subset_of_images_decodes_these_alone():
    vae = tiny_vaes.image_vae()
    latents = torch.randn(4, 4, 4, 4, requires_grad=True)
    sizes = []
    vae.decoder.conv_in.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    pixels = decode(vae, latents, frames=[2])
    assert sizes == [1]
    torch.testing.assert_close(pixels, vae.decode(latents).sample[2:3])
    assert gradient(pixels.sum(), latents).abs().sum((1, 2, 3)).nonzero().tolist() == [[2]]


def test_images_of_a_video():
    vae = tiny_vaes.image_vae()
    latents = torch.randn(2, 4, 3, 4, 4, requires_grad=True)
    expected = torch.stack([vae.decode(latents[:, :, i]).sample for i in range(3)], 2)
    assert_same(decode(vae, latents), expected, latents)


@pytest.mark.parametrize("make", ["wan_vae", "cogvideox_vae", "image_vae"], ids=["wan", "cogvideox", "images"])
def test_slicing_is_followed(make):
    vae = getattr(tiny_vaes, make)()
    latents = torch.randn((3, 4, 4, 4) if make == "image_vae" else (3, 4, 3, 4, 4), requires_grad=True)
    vae.enable_slicing()
    assert_same(decode(vae, latents), vae.decode(latents).sample, latents)


@over([Exact(), Truncated(1), Truncated(0), Full()])
def test_saturated_pixels_can_pass_the_gradient_of_no_clamp(backprop):
    vae = tiny_vaes.wan_vae()
    latents = torch.randn(1, 4, 2, 4, 4, requires_grad=True)
    free = decode(vae, latents, backprop)
    assert free.abs().max() < 1
    expected = gradient(weighted(free), latents)
    vae.decoder.conv_out.bias.data.fill_(9.0)  # every pixel is clamped; the Jacobian before the clamp is the same
    blocked = decode(vae, latents, backprop)
    assert gradient(weighted(blocked), latents).abs().max() == 0
    passed = decode(vae, latents, replace(backprop, saturated="pass"))
    assert torch.equal(passed, blocked)
    assert relative_error(gradient(weighted(passed), latents), expected) < ROUNDING


def test_dropout_and_autocast_are_the_same_when_groups_run_again():
    vae = tiny_vaes.wan_vae().train()
    for module in vae.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    latents = torch.randn(1, 4, 3, 4, 4, requires_grad=True)

    def run(function):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            pixels = function()
        found = gradient(weighted(pixels.float()), latents)  # the backward pass is outside of autocast
        return pixels, found, torch.get_rng_state()

    pixels, expected, state = run(lambda: vae.decode(latents).sample)
    for backprop in EXACT:
        same, got, after = run(lambda b=backprop: decode(vae, latents, b))
        assert torch.equal(same, pixels)
        # In bfloat16 the order of sums shows, and rows are summed in another one.
        assert relative_error(got, expected) < (ROUNDING if backprop.rows is None else 3e-2)
        assert torch.equal(after, state)  # the backward pass draws nothing


def test_a_trained_weight_under_autocast_gets_its_gradient():
    vae = tiny_vaes.wan_vae()
    weight = vae.decoder.mid_block.resnets[0].conv1.weight.requires_grad_()
    latents = torch.randn(1, 4, 2, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradient(weighted(vae.decode(latents).sample.float()), weight)
        pixels = decode(vae, latents)
        assert relative_error(gradient(weighted(pixels.float()), weight), expected) < 3e-2


def _peak(vae, frames: int, backprop) -> float:
    latents = torch.randn(1, 4, frames, 4, 4, requires_grad=True)
    with StorageCount() as storage:
        decode(vae, latents, backprop).sum().backward()
    return storage.peak


def test_memory_does_not_grow_with_the_number_of_frames():
    vae = tiny_vaes.wan_vae()
    pixels = 3 * 3 * 4 * (4 * 4) ** 2 * 4  # bytes of three groups' pixels, which decode returns and so must hold
    caches = 3 * _cache_bytes(vae)
    policies = [Exact(), Exact(cache="recompute"), Exact(cache="host"), Truncated(1), Truncated(0), Full()]
    short, long = ({backprop: _peak(vae, frames, backprop) for backprop in policies} for frames in (3, 6))
    growth = {backprop: long[backprop] - short[backprop] for backprop in policies}
    assert growth[Exact(cache="host")] <= 2 * pixels
    assert growth[Truncated(0)] <= 2 * pixels
    assert growth[Exact(cache="recompute")] <= 2 * pixels + caches / 2  # from 4 sets, two and two, to 5
    assert caches < growth[Exact()] <= 2 * pixels + caches
    assert caches < growth[Truncated(1)] <= 2 * pixels + caches
    assert long[Full()] > 1.8 * short[Full()]
    assert long[Exact()] < _peak(vae, 6, Exact(checkpoint=False)) < long[Full()] / 3


@pytest.mark.parametrize(
    "backprop", [Exact(checkpoint=False), Truncated(1, checkpoint=False)], ids=["exact", "truncated"]
)
def test_caches_are_let_go_with_the_backward_pass(backprop):
    vae = tiny_vaes.wan_vae()
    latents = torch.randn(1, 4, 6, 4, 4, requires_grad=True)
    with StorageCount() as storage:
        pixels = decode(vae, latents, backprop)  # alive, and with it its graph, to the end
        cotangent = torch.ones_like(pixels)
        (first,) = torch.autograd.grad(pixels, latents, cotangent, retain_graph=True)
        with_caches = storage.now
        (second,) = torch.autograd.grad(pixels, latents, cotangent)
        assert torch.equal(first, second)
        assert with_caches + second.nbytes - storage.now >= 4 * _cache_bytes(vae)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(pixels, latents, cotangent)


def _cache_bytes(vae) -> int:
    vae.clear_cache()
    vae._conv_idx = [0]
    with torch.no_grad():
        vae.decoder(torch.randn(1, 4, 1, 4, 4), feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=True)
        vae._conv_idx = [0]
        vae.decoder(torch.randn(1, 4, 1, 4, 4), feat_cache=vae._feat_map, feat_idx=vae._conv_idx)
    total = sum(t.nbytes for t in vae._feat_map if isinstance(t, Tensor))
    vae.clear_cache()
    return total


def _state(vae):
    flags = [(p.requires_grad, p.dtype, p._version) for p in vae.parameters()]
    return vae.training, flags, {k: repr(v) for k, v in vars(vae).items() if "feat" in k or "conv" in k}


@over([Exact(), Truncated(1), Truncated(0), Full()])
def test_the_vae_stays_as_it_was(backprop):
    vae = tiny_vaes.wan_vae().train()
    latents = torch.randn(1, 4, 3, 4, 4, requires_grad=True)
    before = _state(vae)
    decode(vae, latents, backprop).sum().backward()
    assert _state(vae) == before

    calls = 0

    def fail(module, args):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of luck")

    handle = vae.decoder.mid_block.resnets[0].conv1.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        decode(vae, latents, backprop)
    handle.remove()
    assert _state(vae) == before
    assert torch.equal(decode(vae, latents, backprop), vae.decode(latents).sample)


def _noisy_vaes():
    dropout = tiny_vaes.wan_vae().train()
    for module in dropout.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    yield dropout, torch.randn(1, 4, 3, 4, 4, requires_grad=True), {}
    latents = torch.randn(2, 8, 2, 4, 4, requires_grad=True)
    yield tiny_vaes.ltx_vae(conditioned=True), latents, {"temb": torch.tensor([0.1, 0.2])}


@pytest.mark.parametrize(
    "backprop", [Truncated(0), Truncated(0, checkpoint=False), Exact()], ids=["blocks", "groups", "exact"]
)
def test_a_loss_draws_what_decoding_draws(backprop):
    for vae, latents, given in _noisy_vaes():
        torch.manual_seed(7)
        pixels = decode(vae, latents, Full(), **given)
        expected, state = pixels.square().sum(), torch.get_rng_state()
        torch.manual_seed(7)
        loss = decode_loss(vae, latents, lambda p, _: p.square().sum(), backprop, **given)
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(loss, expected)
        torch.rand(3)
        found = gradient(loss, latents)
        if isinstance(backprop, Exact) or given:  # LTX has no recurrence to truncate
            assert relative_error(found, gradient(expected, latents)) < ROUNDING


@pytest.mark.parametrize("videos", [3, 1], ids=["batch", "one"])
def test_a_loss_is_taken_slice_by_slice_where_the_vae_slices(videos):
    vae, seen = tiny_vaes.wan_vae().double(), []
    latents = torch.randn(videos, 4, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    expected = gradient(decode_loss(vae, latents, lambda p, _: p.square().sum(), Exact()), latents)
    vae.enable_slicing()
    vae.decoder.conv_in.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    for backprop in (Exact(), Truncated(0)):
        loss = decode_loss(vae, latents, lambda p, _: p.square().sum(), backprop)
        torch.testing.assert_close(loss, vae.decode(latents).sample.square().sum())
        found = gradient(loss, latents)
        assert backprop != Exact() or relative_error(found, expected) < 1e-12
    assert set(seen) == {1}


@pytest.mark.parametrize("backprop", [Truncated(0), Truncated(0, checkpoint=False)], ids=["blocks", "groups"])
def test_a_scaled_loss_of_half_precision_does_not_underflow(backprop):
    vae = tiny_vaes.wan_vae().half()
    latents = torch.randn(1, 4, 3, 4, 4).half().requires_grad_()
    scale = 2.0**16  # where a GradScaler begins; no number of half precision

    def tiny(pixels, frames=None):
        return pixels.float().square().sum() / 1e8

    expected = gradient(scale * tiny(decode(vae, latents, backprop)), latents)
    found = gradient(scale * decode_loss(vae, latents, tiny, backprop), latents)
    assert expected.abs().max() > 0
    assert relative_error(found.float(), expected.float()) < 2e-2


def test_a_scaled_loss_under_autocast_to_float16_does_not_underflow():
    vae = tiny_vaes.cogvideox_vae()  # whose latents stay float32
    latents = torch.randn(1, 4, 3, 4, 4, requires_grad=True)
    scale = 2.0**16

    def tiny(pixels, frames=None):
        return pixels.float().square().sum() / 1e9

    with torch.autocast("cpu", torch.float16):
        whole, streamed = decode(vae, latents, Truncated(0)), decode_loss(vae, latents, tiny, Truncated(0))
    expected, found = gradient(scale * tiny(whole), latents), gradient(scale * streamed, latents)
    assert expected.abs().max() > 0
    assert relative_error(found, expected) < 2e-2


def test_bfloat16_stays_bfloat16():
    vae = tiny_vaes.wan_vae().bfloat16()
    latents = torch.randn(1, 4, 3, 4, 4).bfloat16().requires_grad_()
    pixels = decode(vae, latents)
    assert torch.equal(pixels, vae.decode(latents).sample)
    expected = gradient(weighted(vae.decode(latents).sample), latents)
    got = gradient(weighted(pixels), latents)
    assert got.dtype == torch.bfloat16
    assert relative_error(got.float(), expected.float()) < 2e-2


def test_wrong_uses_are_refused_in_words():
    vae = tiny_vaes.wan_vae()
    latents = torch.randn(1, 4, 3, 4, 4, requires_grad=True)
    with pytest.raises(UsageError, match="second derivatives"):
        torch.autograd.grad(decode(vae, latents).sum(), latents, create_graph=True)
    with pytest.raises(UsageError, match="second derivatives"):
        torch.autograd.grad(decode_loss(vae, latents, lambda p, _: p.sum(), Truncated(0)), latents, create_graph=True)
    pixels = decode(vae, latents)
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(2)
    with pytest.raises(UsageError, match="weights of the VAE changed"):
        pixels.sum().backward()
    for wrong in (Exact, Truncated, "host", None):
        for call in (lambda b: decode(vae, latents, b), lambda b: decode_loss(vae, latents, lambda p, _: p.sum(), b)):
            with pytest.raises(UsageError, match=r"expected a policy, such as Exact\(\)"):
                call(wrong)
    with pytest.raises(UsageError, match="'num_frames'; beside latents it takes nothing"):
        decode(vae, latents, num_frames=3)
    with pytest.raises(UsageError, match="'num_frames'; beside latents it takes num_frames"):
        decode(tiny_vaes.temporal_vae(), torch.randn(4, 4, 4, 4))
    for frames in (3, [0.5], ["first"]):
        with pytest.raises(UsageError, match="a list of numbers of frames"):
            decode(vae, latents, frames=frames)
    with pytest.raises(UsageError, match=r"\(B, C, F, H, W\), got .*\(4, 3, 4, 4\)"):
        decode(vae, latents[0])
    with pytest.raises(UsageError, match="empty"):
        decode(vae, latents[:, :, :0])
    for frames in ([9], [], [-10], slice(9, None)):
        with pytest.raises(UsageError, match="at least one of the 9 frames"):
            decode(vae, latents, frames=frames)
    with pytest.raises(UsageError, match=r"known are AutoencoderKL, .*AutoencoderKLWan.*register"):
        decode(nn.Linear(1, 1), latents)
    with pytest.raises(UsageError, match=r"4 latent frames are not whole clips of num_frames=3"):
        decode(tiny_vaes.temporal_vae(), torch.randn(4, 4, 4, 4), num_frames=3)
    with pytest.raises(UsageError, match="must return a scalar tensor, got shape"):
        decode_loss(vae, latents, lambda p, _: p)
    with pytest.raises(UsageError, match="no gradient to the pixels"):
        decode_loss(vae, latents, lambda p, _: p.detach().sum())
    for wrong in (-1, 1.5, True):
        with pytest.raises(UsageError, match="expected a whole number"):
            Truncated(wrong)
    with pytest.raises(UsageError, match="expected 'device', 'host' or 'recompute'"):
        Exact(cache="disk")
    with pytest.raises(UsageError, match="expected 'zero' or 'pass'"):
        Full(saturated="maybe")


@pytest.mark.parametrize("changed", ["adamw", "sgd", "data", "mode"])
def test_a_change_before_the_backward_pass_is_seen(changed):
    vae = tiny_vaes.wan_vae()
    weight = vae.decoder.conv_in.weight.requires_grad_()
    latents = torch.randn(1, 4, 3, 4, 4, requires_grad=True)
    decode(vae, latents).sum().backward()
    pixels = decode(vae, latents)
    match changed:
        case "adamw":
            torch.optim.AdamW([weight], fused=True).step()
        case "sgd":
            torch.optim.SGD([weight], 0.1, fused=True).step()
        case "data":
            weight.data = weight.data + 1
        case "mode":
            vae.train()
    with pytest.raises(UsageError, match="weights of the VAE changed, or its mode"):
        pixels.sum().backward()


def test_subclasses_and_new_decoders_are_found(monkeypatch):
    from chopgrad_align.decoding import decoders
    from chopgrad_align.decoding.decoders.image import ImageDecoder

    class Fine(type(tiny_vaes.image_vae())):
        pass

    vae = tiny_vaes.image_vae()
    vae.__class__ = Fine
    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(decode(vae, latents), vae.decode(latents).sample)

    class Brighter(ImageDecoder):
        def epilogue(self, output, clamp):
            return super().epilogue(output, clamp) + 1

    monkeypatch.setattr(decoders, "_KNOWN", dict(decoders._KNOWN))
    decoders.register_decoder(Fine, lambda vae, latents: Brighter(vae, time_axis=0))
    assert torch.equal(decode(vae, latents), vae.decode(latents).sample + 1)

"""What each option of a policy saves, counted, and that none of them changes the gradient."""

from functools import partial
from itertools import pairwise

import pytest
import tiny_vaes
import torch
from gradients import ROUNDING, gradient, relative_error, weighted
from lazy_streams import WAITS, Streams
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from chopgrad_align import Exact, Truncated, UsageError, decode, decode_loss
from chopgrad_align.common.storage_count import StorageCount
from chopgrad_align.decoding.binomial import steps_forward
from chopgrad_align.decoding.graph import Graph
from chopgrad_align.decoding.memory_efficient_layers import MemoryEfficientLayers, framewise
from chopgrad_align.decoding.offload import Device, Host

GIB = 2**30


# --- memory-efficient layers ---


CONVOLUTIONS = {"plain": {}, "strided": {"stride": 2, "padding": 1}, "grouped": {"groups": 2, "dilation": 2}}


@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_frozen_convolution_has_the_same_gradient_and_keeps_no_input(dimensions, settings):
    layer = getattr(nn, f"Conv{dimensions}d")(4, 6, 3, **settings).double()
    x = torch.randn(2, 4, *(9,) * dimensions, dtype=torch.float64, requires_grad=True)
    trained = weighted(layer(x))
    expected = gradient(trained, x)
    layer.requires_grad_(False)
    with MemoryEfficientLayers():
        loss = weighted(layer(x))
    assert torch.equal(gradient(loss, x), expected)

    saved = []
    with MemoryEfficientLayers(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda t: t):
        layer(x)
    assert [t.data_ptr() for t in saved] == [layer.weight.data_ptr()]


def test_a_trained_convolution_keeps_what_its_weight_needs():
    layer = nn.Conv3d(3, 5, 3)
    x = torch.randn(1, 3, 4, 5, 5, requires_grad=True)
    expected = torch.autograd.grad(weighted(layer(x)), [x, layer.weight, layer.bias])
    with MemoryEfficientLayers():
        got = torch.autograd.grad(weighted(layer(x)), [x, layer.weight, layer.bias])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_one_trained_weight_beside_a_frozen_one_gets_its_gradient(trained):
    layer = nn.Conv3d(3, 5, 3).requires_grad_(False)
    weight = getattr(layer, trained).requires_grad_()
    x = torch.randn(1, 3, 4, 5, 5, requires_grad=True)
    expected = torch.autograd.grad(weighted(layer(x)), [x, weight])
    with MemoryEfficientLayers():
        got = torch.autograd.grad(weighted(layer(x)), [x, weight])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


SMALL = {
    **CONVOLUTIONS,
    "same": {"padding": "same"},
    "padded": {"padding": (1, 2, 0)},
    "grouped_only": {"groups": 2},
    "dilated": {"dilation": 2},
}


@pytest.mark.parametrize("settings", SMALL.values(), ids=SMALL.keys())
@pytest.mark.parametrize("round_freely", [False, True], ids=["strict", "free"])
def test_a_small_float32_convolution_by_onednn(settings, round_freely):
    layer = nn.Conv3d(4, 6, 3, **settings).requires_grad_(False)
    x = torch.randn(1, 4, 5, 6, 7, requires_grad=True)
    expected = layer(x)
    with MemoryEfficientLayers(round_freely):
        result = layer(x)
    assert torch.equal(result, expected) or (round_freely and relative_error(result, expected) < 1e-6)
    assert relative_error(gradient(weighted(result), x), gradient(weighted(expected), x)) < 1e-6


def test_framewise_layers_keep_their_input_only():
    layers = (nn.GroupNorm(1, 4), nn.SiLU())  # of a frame alone, the normalisation is framewise
    x = torch.randn(1, 4, 5, 6, 6, requires_grad=True)
    expected = torch.cat([framewise(layers, frame) for frame in x.split(1, 2)], 2)
    with MemoryEfficientLayers():
        result = framewise(layers, x)
    assert torch.equal(result, expected)
    assert relative_error(gradient(weighted(result), x), gradient(weighted(expected), x)) < 1e-6

    wide = torch.randn(1, 64, 8, 16, 16, requires_grad=True)
    norm = (tiny_vaes.wan_vae().decoder.norm_out.__class__(64, images=False).requires_grad_(False), nn.SiLU())
    with StorageCount() as usual:
        kept = framewise(norm, wide)
        assert usual.now > 2 * kept.nbytes
    del kept
    with StorageCount() as efficient, MemoryEfficientLayers():
        kept = framewise(norm, wide)
        assert efficient.now == kept.nbytes  # the result alone...
    assert efficient.peak <= 2.5 * kept.nbytes  # ...and on the way its frames, and scratch of one


# --- blocks with a graph ---


def test_what_a_block_hands_on_is_without_its_graph():
    x = torch.randn(1, 2, 1, 3, 3)
    graph = Graph(lambda hidden, cache: ((2 * hidden[0],), [3 * hidden[0], "kept", None]), (x,), None)
    (output,), (after, *others) = graph.output, graph.after
    assert torch.equal(output, 2 * x)
    assert torch.equal(after, 3 * x)
    assert others == ["kept", None]
    assert output.grad_fn is None
    assert after.grad_fn is None
    found = graph.vjp([torch.ones_like(x)], [], [], retain_graph=True).hidden
    torch.testing.assert_close(found, [torch.full_like(x, 2)])
    found = graph.vjp([torch.ones_like(x)], [torch.ones_like(x), None, None], []).hidden
    torch.testing.assert_close(found, [torch.full_like(x, 5)])


def test_the_graph_of_a_block_ends_where_the_block_does():
    x, cache = torch.randn(1, 2, 1, 3, 3, requires_grad=True), torch.randn(1, 2, 1, 3, 3)
    before = x.exp()
    graph = Graph(lambda hidden, cache: ((hidden[0] * cache,), None), (before,), cache)
    found = graph.vjp([torch.ones_like(x)], [], [])
    torch.testing.assert_close(found.hidden, [cache])
    torch.testing.assert_close(found.cache, [before.detach()])
    assert not cache.requires_grad
    torch.testing.assert_close(gradient(before.sum(), x), x.exp())  # its graph is still there


# --- rows ---


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    "make",
    [tiny_vaes.wan_vae, partial(tiny_vaes.wan_vae, residual=True), tiny_vaes.qwen_image_vae],
    ids=["wan", "wan2_2", "qwen"],
)
def test_rows_change_nothing(make, rows, full_precision):
    vae = make().double()
    channels = vae.config.z_dim
    latents = torch.randn(2, channels, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    expected = gradient(weighted(vae.decode(latents).sample), latents)
    for backprop in (Exact(rows=rows), Exact(rows=rows, cache="host"), Exact(rows=rows, memory_efficient_layers=False)):
        pixels = decode(vae, latents, backprop)
        assert torch.equal(pixels, vae.decode(latents).sample)
        assert relative_error(gradient(weighted(pixels), latents), expected) < 1e-12


def test_rows_give_the_gradient_of_trained_weights(full_precision):
    vae = tiny_vaes.wan_vae().double()
    weights = [
        vae.decoder.conv_out.weight,
        vae.decoder.up_blocks[0].resnets[0].conv1.weight,
        vae.decoder.norm_out.gamma,
    ]
    for weight in weights:
        weight.requires_grad_()
    latents = torch.randn(1, 4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(weighted(vae.decode(latents).sample), [latents, *weights])
    got = torch.autograd.grad(weighted(decode(vae, latents, Exact(rows=4))), [latents, *weights])
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(got, expected, strict=True))


def test_rows_with_several_pending_cotangents():
    vae = tiny_vaes.wan_vae()
    latents = torch.randn(1, 4, 4, 3, 3, requires_grad=True)
    expected = gradient(weighted(decode(vae, latents, Truncated(1))), latents)
    assert relative_error(gradient(weighted(decode(vae, latents, Truncated(1, rows=3))), latents), expected) < ROUNDING


def test_impossible_rows_are_refused():
    with pytest.raises(UsageError, match="Exact: rows=0: expected a whole number, 1 or more"):
        Exact(rows=0)
    with pytest.raises(UsageError, match="use checkpoint=True"):
        Exact(rows=64, checkpoint=False)


# --- offload ---


@pytest.mark.parametrize("place", [Device(), Host(torch.device("cpu"))], ids=["device", "host"])
def test_what_was_put_away_comes_back(place):
    values = [(torch.arange(6.0).view(2, 3), "Rep"), None, {"a": torch.ones(2, dtype=torch.bfloat16).expand(4, 2)}]
    stored = place.offload(values)
    place.prefetch(stored)
    for _ in range(2):
        place.synchronize()
        back = place.load(stored)
        assert torch.equal(back[0][0], values[0][0])
        assert back[0][1] == "Rep"
        assert back[1] is None
        assert torch.equal(back[2]["a"], values[2]["a"])
        assert back[2]["a"].dtype == torch.bfloat16


HOSTED = {
    "blocks": Exact(cache="host"),
    "groups": Exact(cache="host", checkpoint=False),
    "rows": Exact(cache="host", rows=5),
    "band": Truncated(1, cache="host"),
    "apart": Truncated(0, cache="host", checkpoint=False),
}


@pytest.fixture(params=HOSTED.values(), ids=HOSTED.keys())
def hosted(request):
    """A policy with `cache="host"`, and latents with their gradient by it, without streams."""
    vae = tiny_vaes.wan_vae()
    latents = torch.randn(1, 4, 4, 3, 2, requires_grad=True)
    return vae, latents, request.param, gradient(weighted(decode(vae, latents, request.param)), latents)


def test_copies_on_another_stream_are_waited_for(hosted, monkeypatch):
    vae, latents, backprop, expected = hosted
    places = Streams().install(monkeypatch)
    pixels = decode(vae, latents, backprop)
    assert places
    assert all(not place._in_transit for place in places)
    assert torch.equal(pixels, vae.decode(latents).sample)
    assert torch.equal(gradient(weighted(pixels), latents), expected)
    assert not any(place._in_transit or place._prefetched for place in places)


@pytest.mark.parametrize("checkpoint", [True, False], ids=["blocks", "groups"])
def test_copies_of_one_pass_are_waited_for(checkpoint, monkeypatch):
    vae, latents = tiny_vaes.wan_vae(), torch.randn(1, 4, 3, 2, 2, requires_grad=True)

    def loss():
        backprop = Truncated(0, cache="host", checkpoint=checkpoint)
        return decode_loss(vae, latents, lambda pixels, frames: pixels.square().sum(), backprop)

    expected = gradient(loss(), latents)
    places, value = Streams().install(monkeypatch), loss()
    assert places
    assert not any(place._in_transit or place._prefetched for place in places)
    assert torch.equal(gradient(value, latents), expected)


@pytest.mark.parametrize("ignored", WAITS)
def test_each_wait_is_needed(ignored, monkeypatch):
    vae, latents = tiny_vaes.wan_vae(), torch.randn(1, 4, 3, 2, 2, requires_grad=True)
    Streams(ignored).install(monkeypatch)
    assert gradient(weighted(decode(vae, latents, Exact(cache="host"))), latents).isnan().any()


def test_what_is_on_its_way_out_is_held_and_counts_without_cuda_too():
    place = Host(torch.device("cpu"))
    with StorageCount() as count:
        for _ in range(5):
            place.offload(torch.zeros(1000))
        assert count.now == 4000  # the last one
        assert count.peak == 8000  # and the next one, which was made meanwhile
        place.synchronize()
        assert count.now == 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["usual", "channels_last"])
def test_pieces_are_powers_of_two_and_make_up_the_tensor(layout):
    tensor = torch.randn(1, 6, 5, 310, 311).to(memory_format=layout)
    place = Host(torch.device("cpu"))
    with StorageCount() as storage:
        stored = place.offload(tensor)
        assert storage.host == tensor.nbytes
        *large, last = (piece.nbytes for piece in stored.leaves[0]._pieces)
    assert len(large) > 1
    assert all(size & (size - 1) == 0 for size in large)
    assert last <= 2**20
    back = place.load(stored)
    assert torch.equal(back, tensor)
    assert back.stride() == tensor.stride()


def test_the_count_tells_host_from_device():
    with StorageCount() as storage:
        x = torch.zeros(1000)
        stored = Host(torch.device("cpu")).offload(x)
        assert (storage.now, storage.host) == (4000, 4000)
        del x
        assert (storage.now, storage.host) == (0, 4000)
        back = Host(torch.device("cpu")).load(stored)
        assert storage.now == back.nbytes
    assert (storage.peak, storage.host_peak) == (4000, 4000)


# --- the model at its real size, of which nothing is computed ---


def _full_size_peak(backprop, height: int, width: int, frames: int) -> tuple[float, float]:
    """Peak on the device and on the host, in GiB, of decoding one video with Wan 2.1's VAE in bfloat16 and back."""
    from diffusers import AutoencoderKLWan

    before = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            vae = AutoencoderKLWan().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        shape = (1, 16, (frames + 3) // 4, height // 8, width // 8)
        latents = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
        with StorageCount() as storage:
            pixels = decode(vae, latents, backprop)
            pixels.backward(torch.empty_like(pixels))
    return storage.peak / GIB, storage.host_peak / GIB


@pytest.mark.slow
def test_memory_of_wan_at_its_real_size():
    short, long = (_full_size_peak(Exact(cache="host", rows=64), 480, 832, frames)[0] for frames in (13, 17))
    per_latent_frame = long - short
    assert per_latent_frame < 0.1
    assert long + 16 * per_latent_frame <= 4  # at 81 frames


@pytest.mark.slow
def test_memory_of_few_sets_of_caches_of_wan():
    backprop = Exact(cache="host", rows=64, cache_sets=4)
    (_, short), (device, long) = (_full_size_peak(backprop, 480, 832, frames) for frames in (25, 29))
    assert long == short <= 12  # whatever the number of frames
    assert device <= 4
    # At 81 frames, or 21 groups; all that is there without it is 3F + B, with B = 2F.
    assert steps_forward(21, 4) - 20 <= 0.35 * 5 * 21


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width", "goal"), [(480, 832, 4), (720, 1280, 8), (1088, 1920, 16)])
def test_memory_of_81_frames_of_wan(height, width, goal):
    device, host = _full_size_peak(Exact(cache="host", rows=64), height, width, 81)
    assert device <= goal
    assert host > device  # where the caches are


@pytest.mark.slow
def test_every_lever_saves_memory_at_the_real_size():
    levers = [
        Exact(checkpoint=False, memory_efficient_layers=False),
        Exact(checkpoint=False),
        Exact(),
        Exact(cache="host"),
        Exact(cache="host", rows=64),
    ]
    peaks = [_full_size_peak(backprop, 480, 832, 9)[0] for backprop in levers]
    assert all(less < 0.9 * more for more, less in pairwise(peaks)), peaks

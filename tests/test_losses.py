"""The losses: values against references, gradients, regions, chunks and memory, loading, and mistakes."""

import importlib
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradients import relative_error
from safetensors.torch import save_file
from torch import nn

import chopgrad_align.objective.losses
from chopgrad_align.common.errors import UsageError
from chopgrad_align.common.storage_count import StorageCount
from chopgrad_align.objective.losses import LOSSES, FrameLoss, VideoLoss, load_loss
from chopgrad_align.objective.losses.backbone import run
from chopgrad_align.objective.losses.protocol import compare, frames_read

SIZE = (32, 40)
SIZES = {"dists": (16, 20)}  # VGG is not small
PIXELWISE = ["l1", "l2", "charbonnier"]
MAPPED = [*PIXELWISE, "ssim", "lpips"]
FRAMEWISE = [*MAPPED, "ms_ssim", "dists", "fourier", "psnr"]
NAMES = [*FRAMEWISE, "frame_difference", "flow_warp"]


def random_features(network, bias=0.0):
    """The convolutional layers of torchvision's model, with random weights."""
    from torchvision import models

    torch.manual_seed(0)
    with torch.device("meta"):
        layers = {"vgg": models.vgg16, "alex": models.alexnet}[network]().features
    layers = layers.to_empty(device="cpu")
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.constant_(layer.bias, bias)
    return layers


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """`vgg.pth`, with a part of its classifier, `alex.safetensors` and `raft.pth`: torchvision's formats."""
    from torchvision.models.optical_flow import raft_small

    folder = tmp_path_factory.mktemp("losses")
    vgg = {f"features.{key}": value for key, value in random_features("vgg").state_dict().items()}
    torch.save(vgg | {"classifier.6.bias": torch.zeros(1000)}, folder / "vgg.pth")
    alex = {f"features.{key}": value for key, value in random_features("alex").state_dict().items()}
    save_file(alex, folder / "alex.safetensors")
    raft = raft_small()
    with torch.no_grad():
        raft.update_block.flow_head.conv2.weight.mul_(0.05)  # a flow of noise would hold nowhere
        raft.update_block.flow_head.conv2.bias.zero_()
    torch.save(raft.state_dict(), folder / "raft.pth")
    return folder


@pytest.fixture
def make(checkpoints):
    arguments = {
        "dists": {"checkpoint": str(checkpoints / "vgg.pth")},
        "flow_warp": {"weights": str(checkpoints / "raft.pth"), "model": "small", "updates": 1},
        "lpips": {"network": "alex", "checkpoint": str(checkpoints / "alex.safetensors")},
        "ms_ssim": {"scales": 2},
    }
    return lambda name, **more: load_loss(name, **{**arguments.get(name, {}), **more})


def pair(size=SIZE, batch=2, frames=3, dtype=torch.float64):
    """A target with large and small details, and a video that is something like it."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(batch * frames, 3, 4, 5, generator=generator, dtype=dtype)
    target = F.interpolate(coarse, size, mode="bilinear") * 0.7
    target = target + 0.3 * torch.rand(target.shape, generator=generator, dtype=dtype)
    video = 0.8 * target + 0.2 * torch.rand(target.shape, generator=generator, dtype=dtype)
    shape = (batch, frames, 3, *size)
    return video.view(shape).requires_grad_(), target.view(shape)


def box(video):
    """A mask with a box that moves by a pixel a frame, and is elsewhere in each sample."""
    mask = torch.zeros_like(video[:, :, :1]).detach()
    for b in range(video.shape[0]):
        for t in range(video.shape[1]):
            mask[b, t, :, 2 + b : 2 + b + video.shape[3] // 2, 3 + t : 3 + t + video.shape[4] // 2] = 1
    return mask


# --- values -----------------------------------------------------------------------------------------------------------


def reference(name, video, target):
    """Of one sample, `(F, 3, H, W)` in numpy, one number at a time."""
    values = []
    if name == "frame_difference":
        video, target = video[1:] - video[:-1], target[1:] - target[:-1]
    for v, t in zip(video.flat, target.flat, strict=True):
        d = float(v - t)
        values.append({"l2": d * d, "charbonnier": math.sqrt(d * d + 1e-6)}.get(name, abs(d)))
    return sum(values) / len(values)


def test_psnr_is_fifty_less_the_metric():
    from chopgrad_align.evaluation.metrics.psnr import PSNR

    video, target = pair(batch=1)
    measured = PSNR()(video[0].detach(), target[0])
    assert 10 < measured < 40
    assert load_loss("psnr")(video, target).item() == pytest.approx(50 - measured, abs=0.05)


@pytest.mark.parametrize("name", [*PIXELWISE, "frame_difference"])
def test_values(make, name):
    video, target = pair((5, 6))
    expected = [reference(name, *sample) for sample in zip(video.detach().numpy(), target.numpy(), strict=True)]
    torch.testing.assert_close(make(name)(video, target), torch.tensor(expected, dtype=torch.float64))


def test_fourier_value(make):
    video, target = pair((4, 5), batch=1, frames=2)
    height, width = 4, 5
    magnitudes = []
    for frames in (video.detach().numpy(), target.numpy()):
        waves = [
            sum(
                frames[..., y, x] * np.exp(-2j * np.pi * (k * y / height + m * x / width))
                for y in range(height)
                for x in range(width)
            )
            for k in range(height)
            for m in range(width)
        ]
        magnitudes.append(np.abs(np.stack(waves)) / math.sqrt(height * width))
    expected = np.abs(magnitudes[0] - magnitudes[1]).mean()
    loss = make("fourier")
    torch.testing.assert_close(loss(video, target).item(), float(expected))
    # Phases are free: a frame that is shifted around is the same. The bound is the root mean square.
    assert loss(target.roll((1, 2), (3, 4)), target).item() < 1e-12
    assert loss(video, target) <= (video - target).square().mean().sqrt()


def ssim_maps(x, y):
    """SSIM and its contrast and structure term at each pixel of two planes, from their definition."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    px, py = (np.pad(plane, 5, mode="reflect") for plane in (x, y))
    ssim, contrast = np.zeros(x.shape), np.zeros(x.shape)
    for row in range(x.shape[0]):
        for column in range(x.shape[1]):
            a, b = (plane[row : row + 11, column : column + 11] for plane in (px, py))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            contrast[row, column] = (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2)
            luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
            ssim[row, column] = luminance * contrast[row, column]
    return ssim, contrast


def test_ssim_value(make):
    video, target = pair((9, 12), batch=1, frames=1)
    planes = zip(video.detach().numpy()[0, 0], target.numpy()[0, 0], strict=True)
    expected = 1 - np.mean([ssim_maps(x, y)[0] for x, y in planes])
    torch.testing.assert_close(make("ssim")(video, target).item(), float(expected))


def test_ms_ssim_value(make):
    video, target = pair((23, 26), batch=1, frames=1)
    products = []
    for x, y in zip(video.detach().numpy()[0, 0], target.numpy()[0, 0], strict=True):
        finest = ssim_maps(x, y)[1][5:-5, 5:-5].mean()
        # The odd side gets a black line at each end: 25 lines, of which the last is left over.
        halves = [np.pad(p, ((1, 1), (0, 0)))[:24].reshape(12, 2, 13, 2).mean((1, 3)) for p in (x, y)]
        coarsest = ssim_maps(*halves)[0][5:-5, 5:-5].mean()
        exponents = np.array([0.0448, 0.2856]) / (0.0448 + 0.2856)
        products.append(finest ** exponents[0] * coarsest ** exponents[1])
    torch.testing.assert_close(make("ms_ssim")(video, target).item(), float(1 - np.mean(products)))


def pytorch_msssims(x, y):
    """The value of the package `pytorch_msssim` for frames `(N, 3, H, W)`, step by step."""
    places = torch.arange(11, dtype=x.dtype) - 5
    window = (-(places**2) / (2 * 1.5**2)).exp()
    window = (window / window.sum()).expand(3, 1, 1, 11)

    def blurred(z):
        return F.conv2d(F.conv2d(z, window.transpose(2, 3), groups=3), window, groups=3)

    terms = []
    for level in range(5):
        mu1, mu2 = blurred(x), blurred(y)
        variance1, variance2 = blurred(x * x) - mu1**2, blurred(y * y) - mu2**2
        contrast = (2 * (blurred(x * y) - mu1 * mu2) + 0.0009) / (variance1 + variance2 + 0.0009)
        similarity = (2 * mu1 * mu2 + 0.0001) / (mu1**2 + mu2**2 + 0.0001) * contrast
        terms.append((similarity if level == 4 else contrast).flatten(2).mean(-1).relu())
        padding = [side % 2 for side in x.shape[2:]]
        x, y = (F.avg_pool2d(z, kernel_size=2, padding=padding) for z in (x, y))
    weights = x.new_tensor([0.0448, 0.2856, 0.3001, 0.2363, 0.1333]).view(-1, 1, 1)
    return (torch.stack(terms) ** weights).prod(0).mean(1)


@pytest.mark.parametrize("size", [(176, 192), (181, 203)], ids=["even", "odd"])
def test_ms_ssim_is_that_of_pytorch_msssim(make, size):
    video, target = pair(size, batch=2, frames=1)
    expected = 1 - pytorch_msssims(video[:, 0], target[:, 0])
    torch.testing.assert_close(make("ms_ssim", scales=5)(video, target), expected, rtol=1e-4, atol=1e-6)


def test_ms_ssim_of_the_opposite_has_a_gradient_that_is_a_number(make):
    _, target = pair(batch=1, frames=1)
    video = (1 - target).requires_grad_()  # every contrast is negative
    value = make("ms_ssim")(video, target)
    assert 0.99 < value.item() <= 1
    assert torch.autograd.grad(value.sum(), video)[0].isfinite().all()


@pytest.mark.parametrize("network", ["vgg", "alex"])
def test_lpips_is_the_official_one(checkpoints, network):
    import lpips

    file = {"vgg": "vgg.pth", "alex": "alex.safetensors"}[network]
    loss = load_loss("lpips", network=network, checkpoint=str(checkpoints / file), frames_per_chunk=4).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchvision, of how lpips asks it for a model
        official = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    convolutions = [layer for layer in official.net.modules() if isinstance(layer, nn.Conv2d)]
    for mine, theirs in zip(
        (layer for layer in loss.features if isinstance(layer, nn.Conv2d)), convolutions, strict=True
    ):
        theirs.load_state_dict(mine.state_dict())
    video, target = pair((33, 40), batch=2, frames=2)
    expected = official.double()(video.flatten(0, 1), target.flatten(0, 1), normalize=True).view(2, 2).mean(1)
    value = loss(video, target)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(v.sum(), video)[0] for v in (value, expected)]
    assert relative_error(*gradients) < 1e-5


def test_dists_is_the_official_one(make, monkeypatch):
    from torchmetrics.functional.image import dists

    loss = make("dists", frames_per_chunk=4)
    plain = random_features("vgg")  # the same that the checkpoint has
    monkeypatch.setattr(dists, "vgg16", lambda weights: type("Model", (), {"features": plain}))
    official = dists.DISTSNetwork().double()
    video, target = pair((33, 40), batch=2, frames=2)
    expected = official(video.flatten(0, 1), target.flatten(0, 1), require_grad=True).view(2, 2).mean(1)
    value = loss.double()(video, target)
    torch.testing.assert_close(value, expected, rtol=0, atol=2e-7)  # the learned weights are float32
    gradients = [torch.autograd.grad(v.sum(), video)[0] for v in (value, expected)]
    assert relative_error(*gradients) < 1e-5


def shifted(size, frames, speed):
    """A picture that moves to the left by `speed` pixels a frame."""
    _, wide = pair((size[0], size[1] + speed * frames), batch=1, frames=1)
    return torch.stack([wide[0, 0, :, :, speed * t : speed * t + size[1]] for t in range(frames)])[None]


def test_flow_warp_value(make, monkeypatch):
    loss, speed = make("flow_warp", pairs_per_chunk=2).double(), 2
    target = shifted((12, 20), 4, speed)
    calls = []

    def flow(first, second):
        calls.append(len(first))
        direction = -speed if torch.equal(first[0, :, :, speed:], second[0, :, :, :-speed]) else speed
        return torch.stack([first.new_full(first[:, 0].shape, direction), torch.zeros_like(first[:, 0])], 1)

    monkeypatch.setattr(loss.flow, "forward", flow)
    generator = torch.Generator().manual_seed(0)
    video = (target + 0.1 * torch.rand(target.shape, generator=generator, dtype=target.dtype)).requires_grad_()
    value = loss(video, target)
    assert calls == [2, 2, 1, 1]  # forward and backward, for each of two chunks
    # A constant flow holds everywhere; what it reads beyond the border is the border.
    v = video.detach().numpy()[0]
    warped = np.concatenate([np.repeat(v[1:, :, :, :1], speed, 3), v[1:, :, :, :-speed]], 3)
    expected = np.abs(warped - v[:-1]).mean()
    torch.testing.assert_close(value.item(), float(expected))
    value.sum().backward()
    assert len(calls) == 4  # the flow is kept, not computed again

    # The target follows its own flow but for the border, where pixels come in; a still does not.
    inner = torch.zeros_like(target[:, :, :1])
    inner[..., speed:] = 1
    own = make("flow_warp", inside=1, outside=0).double()
    monkeypatch.setattr(own.flow, "forward", flow)
    monkeypatch.setattr(
        "chopgrad_align.objective.losses.flow_warp.occluded",
        lambda f, b: torch.zeros_like(f[:, 0]).bool().index_fill(2, torch.arange(speed), True),
    )
    assert own(target, target, torch.ones_like(inner)).item() < 1e-12
    assert own(target[:, :1].expand_as(target), target, torch.ones_like(inner)).item() > 0.01


def test_flow_warp_leaves_out_what_is_hidden(make, monkeypatch):
    loss = make("flow_warp").double()
    video, target = pair((16, 18), batch=1, frames=2)
    monkeypatch.setattr(loss.flow, "forward", lambda first, second: torch.zeros_like(first[:, :2]))
    hidden = torch.zeros(1, 16, 18, dtype=torch.bool)
    hidden[:, 4:9, 5:] = True
    monkeypatch.setattr("chopgrad_align.objective.losses.flow_warp.occluded", lambda forward, backward: hidden)
    value = loss(video, target)
    expected = ((video[0, 1] - video[0, 0]).abs() * ~hidden).mean()
    torch.testing.assert_close(value[0], expected)
    (gradient,) = torch.autograd.grad(value.sum(), video)
    assert not gradient[..., 4:9, 5:].any()


def test_flow_is_of_the_target_alone(make):
    loss = make("flow_warp")
    video, target = pair(batch=1, frames=2, dtype=torch.float32)
    guide = loss.guide(target[0])
    seen = []
    forward = loss.flow.forward
    loss.flow.forward = lambda *frames: seen.append(frames) or forward(*frames)
    loss(video, target.requires_grad_())
    assert all(torch.equal(frames[0], target[0, t : t + 1]) for frames, t in zip(seen, (0, 1), strict=True))
    assert guide.shape == (1, 3, *SIZE)
    assert 0 < guide[:, 2].mean() <= 1
    torch.testing.assert_close(loss.error(video[0], guide).mean(), loss(video, target)[0])


# --- what holds for all of them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name != "flow_warp"])
def test_least_where_the_video_is_the_target(make, name):
    video, target = pair(SIZES.get(name, SIZE), dtype=torch.float32)
    loss = make(name)
    own, other, grey = loss(target, target), loss(video, target), loss(torch.full_like(target, 0.5), target)
    least = 1e-3 if name == "charbonnier" else 0
    torch.testing.assert_close(own, torch.full((2,), float(least)), rtol=1e-5, atol=1e-6)
    assert (other > own + 1e-3).all()
    assert (grey > other).all()


@pytest.mark.parametrize("name", NAMES)
def test_samples_do_not_mix_and_chunks_make_no_difference(make, name):
    video, target = pair(SIZES.get(name, SIZE))
    more = {"pairs_per_chunk": 1} if isinstance(make(name), VideoLoss) else {"frames_per_chunk": 2}
    chunked = make(name, **more).double()
    together = chunked(video, target)
    alone = torch.cat([make(name).double()(video[b : b + 1], target[b : b + 1]) for b in (0, 1)])
    torch.testing.assert_close(together, alone, rtol=1e-8, atol=0)
    assert together.shape == (2,)
    assert (together > 0).all()
    (gradient,) = torch.autograd.grad(together[0], video)
    assert not gradient[1].any()
    assert (gradient[0].abs().amax((1, 2, 3)) > 0).all()
    (expected,) = torch.autograd.grad(alone[0], video)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", [*PIXELWISE, "ssim", "fourier", "frame_difference"])
def test_gradient_of_every_pixel(make, name):
    video, target = pair((6, 7), batch=1, frames=2)
    assert torch.autograd.gradcheck(make(name), (video, target))
    if name != "fourier":
        loss = make(name, inside=1.5, outside=0.25)
        assert torch.autograd.gradcheck(loss, (video, target, box(video)))


@pytest.mark.parametrize("name", ["ms_ssim", "lpips", "dists", "flow_warp"])
def test_gradient_equals_finite_differences(make, name):
    loss = make(name).double()
    video, target = pair(SIZES.get(name, SIZE), batch=1, frames=2)
    (gradient,) = torch.autograd.grad(loss(video, target).sum(), video)
    direction = torch.randn(video.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-7
    with torch.no_grad():
        above, below = (loss(video + sign * step * direction, target).sum() for sign in (1, -1))
    torch.testing.assert_close((gradient * direction).sum(), (above - below) / (2 * step), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_and_no_graph(make, name):
    video, target = pair(SIZES.get(name, SIZE), frames=2, dtype=torch.float32)
    loss = make(name)
    half = video.detach().bfloat16().requires_grad_()
    value = loss(half, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(video, target), rtol=0.05, atol=1e-3)
    (gradient,) = torch.autograd.grad(value.sum(), half)
    assert gradient.dtype == torch.bfloat16
    assert gradient.isfinite().all()
    with torch.no_grad():
        assert not loss(video, target).requires_grad
    assert not loss(video.detach(), target).requires_grad


# --- regions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", [{"inside": 1, "outside": 0}, {"inside": 0, "outside": 2.0}])
def test_what_has_no_weight_has_neither_error_nor_gradient(make, name, weights):
    video, target = pair(SIZES.get(name, SIZE))
    mask = box(video)
    outside = (mask == (1 if weights["inside"] == 0 else 0)).expand_as(video)
    loss = make(name, **weights).double()
    value = loss(video, target, mask)
    (gradient,) = torch.autograd.grad(value.sum(), video)
    assert not gradient[outside].any()
    assert gradient[~outside].any()
    elsewhere = torch.where(outside, torch.rand_like(video), video)
    assert torch.equal(loss(elsewhere, target, mask), value)
    # Bool and integer masks are masks too.
    assert torch.equal(loss(video, target, mask.bool()), value)


@pytest.mark.parametrize("name", [*PIXELWISE, "frame_difference"])
def test_regions_add_up(make, name):
    video, target = pair((9, 11))
    mask = box(video)
    error = make(name).double()
    maps = []
    for v, t in zip(video, target, strict=True):
        maps.append(error.error(v, error.guide(t) if name == "frame_difference" else t))
    maps = torch.stack(maps)
    weight = 3 * mask + 0.5 * (1 - mask)
    if name == "frame_difference":
        weight = torch.maximum(weight[:, 1:], weight[:, :-1])
    expected = (maps * weight[:, :, 0]).mean((1, 2, 3))
    torch.testing.assert_close(make(name, inside=3, outside=0.5)(video, target, mask), expected)
    assert not torch.allclose(expected, make(name)(video, target))


def test_the_maps_of_lpips_are_weighed_at_their_own_size(make):
    video, target = pair((48, 70), batch=1, frames=2)
    loss = make("lpips", inside=2, outside=0.5).double()
    mask = box(video)
    expected = 0
    for map_ in loss.error(video[0], target[0]):
        share = F.adaptive_avg_pool2d(mask[0], map_.shape[-2:])[:, 0]
        expected = expected + (map_ * (2 * share + 0.5 * (1 - share))).mean()
    torch.testing.assert_close(loss(video, target, mask)[0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_equal_weights_need_no_mask(make, name):
    video, target = pair(SIZES.get(name, SIZE), frames=2)
    expected = 2 * make(name).double()(video, target)
    loss = make(name, inside=2, outside=2).double()
    torch.testing.assert_close(loss(video, target), expected)
    torch.testing.assert_close(loss(video, target, box(video)), expected)


# --- frames and memory ------------------------------------------------------------------------------------------------


def test_frames_that_are_read():
    video, target = pair((5, 6), batch=3, frames=9)
    loss = load_loss("l1", frames={"stride": 4}, inside=2, outside=1)
    expected = load_loss("l1", inside=2, outside=1)(video[:, ::4], target[:, ::4], box(video)[:, ::4])
    torch.testing.assert_close(loss(video, target, box(video)), expected)
    assert frames_read(loss, 9, [0, 1]) == [[0, 4, 8]] * 2
    assert frames_read(load_loss("frame_difference"), 3, [0]) == [[0, 1, 2]]

    loss, seeds = load_loss("l1", frames={"random": 2}), [7, 9, 7]
    read = frames_read(loss, 9, seeds)
    assert read[0] == read[2] != read[1]
    values = compare(loss, video, target, seeds=seeds)
    for b, frames in enumerate(read):
        torch.testing.assert_close(values[b], load_loss("l1")(video[b : b + 1, frames], target[b : b + 1, frames])[0])
    torch.testing.assert_close(
        compare(load_loss("frame_difference"), video, target, seeds=seeds)[0],
        load_loss("frame_difference")(video, target)[0],
    )
    torch.manual_seed(0)
    first, second = loss(video, target), loss(video, target)
    torch.manual_seed(0)
    assert torch.equal(loss(video, target), first)
    assert not torch.equal(first, second)


def test_parts_of_a_video_add_up():
    video, target = pair((5, 6), frames=7)
    loss = load_loss("l2", inside=1, outside=0.1)
    mask = box(video)
    parts = [
        loss(*(x[:, part] for x in (video, target, mask))) * n / 7 for part, n in ((slice(0, 3), 3), (slice(3, 7), 4))
    ]
    torch.testing.assert_close(parts[0] + parts[1], loss(video, target, mask))


def peak(loss, frames, size=(24, 32)):
    """Bytes of a forward and a backward pass beside the gradient of the video."""
    video, target = pair(size, batch=1, frames=frames, dtype=torch.float32)
    mask = box(video)
    with StorageCount() as storage:
        torch.autograd.grad(loss(video, target, mask).sum(), video)
    return storage.peak - video.nbytes


@pytest.mark.parametrize("name", ["l1", "ssim", "fourier"])
def test_the_peak_does_not_grow_with_the_frames(name):
    weights = {"inside": 1.0, "outside": 0.0}
    chunked = [peak(load_loss(name, frames_per_chunk=2, **weights), frames) for frames in (4, 36)]
    whole = [peak(load_loss(name, frames_per_chunk=100, **weights), frames) for frames in (4, 36)]
    pixels = 32 * 3 * 24 * 32 * 4  # of the further frames: the gradients of chunks wait to be joined
    assert chunked[1] - chunked[0] < 1.1 * pixels
    assert whole[1] - whole[0] > 3 * pixels
    read = [peak(load_loss(name, frames=4, frames_per_chunk=2, **weights), frames) for frames in (4, 36)]
    assert read[1] - read[0] < 1.1 * pixels


def test_the_peak_of_lpips_is_that_of_a_chunk(make):
    short, long = (peak(make("lpips", frames_per_chunk=1), frames, SIZE) for frames in (2, 10))
    pixels = 8 * 3 * SIZE[0] * SIZE[1] * 4
    assert long - short < 1.1 * pixels
    assert peak(make("lpips", frames_per_chunk=10), 10, SIZE) > 4 * long


@pytest.mark.parametrize("name", ["frame_difference", "flow_warp"])
def test_the_peak_of_pairs_grows_by_what_is_kept_of_the_target(make, name, monkeypatch):
    loss = make(name, pairs_per_chunk=2, inside=1.0, outside=0.5)
    if name == "flow_warp":  # RAFT's own peak, of one chunk, would hide the rest
        monkeypatch.setattr(loss.flow, "forward", lambda first, second: torch.zeros_like(first[:, :2]))
    pixels = 16 * 3 * 24 * 32 * 4  # of the further frames: for each pair a flow and where it holds, or a difference
    assert peak(loss, 34) - peak(loss, 18) < 1.1 * pixels


# --- loading ----------------------------------------------------------------------------------------------------------

SOURCE = """
from chopgrad_align.objective.losses import FrameLoss

class Bright(FrameLoss):
    def error(self, frames, target):
        return (frames - target).clamp(min=0).amax(1)

class Flat(FrameLoss):
    def error(self, frames, target):
        return (frames - target).abs().mean((1, 2, 3))

def makes_none():
    return None
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path


def test_every_loss_of_the_folder_has_a_name():
    files = {path.stem for path in Path(chopgrad_align.objective.losses.__file__).parent.glob("*.py")}
    assert set(LOSSES) == files - {"__init__", "backbone", "loading", "protocol"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_loss_is_frozen(make, name):
    loss = make(name)
    assert isinstance(loss, FrameLoss if name in FRAMEWISE else VideoLoss)
    assert not any(module.training for module in loss.modules())
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert type(loss).__doc__


def test_a_loss_of_ones_own(folder, monkeypatch):
    video, target = pair((5, 6))
    expected = (video - target).clamp(min=0).amax(2).mean((1, 2, 3))
    torch.testing.assert_close(load_loss("mine.py:Bright")(video, target), expected)
    monkeypatch.syspath_prepend(folder)
    torch.testing.assert_close(load_loss("mine:Bright", frames=1)(video, target).shape, expected.shape)
    sys.modules.pop("mine")


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("lpisp", {}, "^no loss is called 'lpisp'; did you mean 'lpips'.* Known: charbonnier, dists, .*; or give"),
        ("mine.py", {}, "for a class in that file, write 'mine.py:Class'"),
        ("mine.py:Brigth", {}, "^loss 'mine.py:Brigth': mine.py has no 'Brigth'; did you mean 'Bright'"),
        ("mine.py:makes_none", {}, r"made a NoneType, which cannot be called as loss\(video, target, mask\)"),
        ("l1", {"insid": 1}, "^loss 'l1': .*'insid'; did you mean 'inside'?.* Its arguments: frames, "),
        ("l1", {"frames": "frist"}, "^L1: frames='frist': expected .*; did you mean 'first'"),
        ("l1", {"frames_per_chunk": 0}, "^L1: frames_per_chunk=0: expected a whole number, 1 or more$"),
        ("l1", {"inside": -1}, "^L1: inside=-1: expected a number, 0 or more$"),
        ("l1", {"outside": math.inf}, "^L1: outside=inf: expected a number, 0 or more$"),
        ("l1", {"outside": "0"}, "^L1: outside='0': expected a number, 0 or more$"),
        ("l1", {"inside": 0, "outside": 0}, "^L1: inside=0 and outside=0 leave nothing to compare$"),
        ("fourier", {"outside": 0.5}, "^Fourier: inside=1.0, outside=0.5: .* can leave a region out .* not weigh it$"),
        ("charbonnier", {"epsilon": 0}, "^Charbonnier: epsilon=0: expected a number above 0$"),
        ("ms_ssim", {"scales": 6}, "^MSSSIM: scales=6: expected 5 at most$"),
        ("frame_difference", {"pairs_per_chunk": 1.5}, "^FrameDifference: pairs_per_chunk=1.5: expected a whole"),
        ("lpips", {"network": "resnet"}, "^LPIPS: network='resnet': expected 'vgg' or 'alex'$"),
        ("lpips", {"checkpoint": "none.pth"}, "^LPIPS: checkpoint='none.pth' cannot be loaded: .*torchvision's vgg16"),
        ("dists", {"checkpoint": "mine.py"}, "^DISTS: checkpoint='mine.py' cannot be loaded: it is damaged"),
        ("flow_warp", {"weights": "none.pth"}, "^FlowWarp: weights='none.pth' cannot be loaded"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded(folder, name, args, message):
    with pytest.raises(UsageError, match=message):
        load_loss(name, **args)


def test_a_checkpoint_of_another_network_or_with_code(checkpoints, tmp_path):
    with pytest.raises(UsageError, match=r"alex.safetensors holds other weights: '0.weight' is \(64, 3, 11, 11\)"):
        load_loss("lpips", checkpoint=str(checkpoints / "alex.safetensors"))
    torch.save({"features.0.weight": Path("code")}, tmp_path / "code.pth")
    with pytest.raises(UsageError, match="it is damaged, or holds Python objects besides tensors"):
        load_loss("dists", checkpoint=str(tmp_path / "code.pth"))


def test_the_default_is_torchvisions_file_in_the_cache(checkpoints, tmp_path, monkeypatch):
    """Which is not downloaded if it is there; nor is it read as code."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").symlink_to(checkpoints / "vgg.pth")
    video, target = pair(batch=1, frames=1)
    from_cache, from_file = load_loss("dists"), load_loss("dists", checkpoint=str(checkpoints / "vgg.pth"))
    assert torch.equal(from_cache.double()(video, target), from_file.double()(video, target))


@pytest.mark.parametrize(("name", "package"), [("ssim", "torchmetrics"), ("dists", "torchmetrics"), ("lpips", "lpips")])
def test_a_missing_package_names_the_extra(monkeypatch, name, package):
    importlib.import_module(LOSSES[name].partition(":")[0])
    monkeypatch.delitem(sys.modules, LOSSES[name].partition(":")[0])
    for module in [package, *(m for m in sys.modules if m.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)  # what Python itself treats as not installed
    with pytest.raises(
        UsageError, match=rf"^loss '{name}' needs the module '{package}.*pip install 'chopgrad-align\[metrics\]'"
    ):
        load_loss(name)


# --- mistakes in a call -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["l1", "frame_difference"])
def test_shapes_that_do_not_fit(name):
    video, target = pair((8, 9))
    loss = load_loss(name, inside=1, outside=0.5)
    title = type(loss).__name__
    mask = box(video)
    for v, t in ((video, target[:, :2]), (video, target[..., 1:]), (video[0], target[0]), (mask, mask)):
        with pytest.raises(UsageError, match=rf"^{title}: expected a video and a target \(B, F, 3, H, W\) of the same"):
            loss(v, t, mask)
    for m in (mask[:, :2], mask[:, :, 0], mask.expand_as(video)):
        with pytest.raises(UsageError, match=rf"^{title}: expected a mask \(2, 3, 1, 8, 9\) for this video, got"):
            loss(video, target, m)
    with pytest.raises(UsageError, match=rf"^{title}: inside=1 and outside=0.5 weigh a mask, but there is none: give"):
        loss(video, target)


def test_frames_that_are_too_few_or_too_small(make):
    video, target = pair((15, 9))
    with pytest.raises(UsageError, match=r"^FrameDifference: expected a video of 2 frames or more, got 1$"):
        load_loss("frame_difference")(video[:, :1], target[:, :1])
    with pytest.raises(UsageError, match=r"^MSSSIM: scales=2: expected frames of 22x22 pixels or more, got 15x9$"):
        make("ms_ssim")(video, target)
    with pytest.raises(UsageError, match=r"^LPIPS: expected frames of 31x31 pixels or more, got 15x9$"):
        make("lpips")(video, target)
    with pytest.raises(UsageError, match=r"^DISTS: expected frames of 16x16 pixels or more, got 15x9$"):
        make("dists")(video, target)
    with pytest.raises(UsageError, match=r"^SSIM: expected frames of 6x6 pixels or more, got 15x5$"):
        load_loss("ssim")(video[..., :5], target[..., :5])


def test_the_smallest_frames_are_large_enough(make, checkpoints):
    vgg = str(checkpoints / "vgg.pth")
    for loss, side in [(make("ssim"), 6), (make("ms_ssim"), 22), (make("lpips"), 31), (make("dists"), 16),
                       (load_loss("lpips", network="vgg", checkpoint=vgg), 16)]:  # fmt: skip
        video, target = pair((side, side), batch=1, frames=1, dtype=torch.float32)
        assert loss(video, target).isfinite().all()


def test_an_error_of_the_wrong_shape_is_named(folder):
    video, target = pair((5, 6))
    with pytest.raises(UsageError, match=r"^Flat.error returned shape \(6,\), expected a map \(N, h, w\); .*has_map"):
        load_loss("mine.py:Flat")(video, target)


def test_layers_are_run_up_to_the_last_that_is_wanted():
    layers = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(4, 2), nn.Linear(99, 1))
    first, last = run(layers, -torch.ones(1, 2, 2), (1, 2))
    assert torch.equal(first, torch.zeros(1, 4))
    assert last.shape == (1, 2)

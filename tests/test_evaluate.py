"""Figures of predicted videos against their targets, methods side by side, and the script of both."""

import csv
import math
import re
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from script_runs import run_script

from chopgrad_align.common.errors import UsageError
from chopgrad_align.data import procedural
from chopgrad_align.data.clips import Clip
from chopgrad_align.data.video import read_video, write_video
from chopgrad_align.evaluation.compare import compare, input_video, target_video
from chopgrad_align.evaluation.estimates import Estimate, estimate, paired_difference
from chopgrad_align.evaluation.metrics import load_metrics
from chopgrad_align.evaluation.metrics.fvd import frechet_distance
from chopgrad_align.evaluation.side_by_side import side_by_side

FORMULAS = ["psnr", "ssim", "warping_error", "relative_warping_error", "flicker"]


def footage(seed, frames=6, size=48):
    return procedural.texture_clip(seed, frames=frames, size=size).transpose(0, 1).contiguous()


def noisy(video, seed, sigma=0.1):
    generator = torch.Generator().manual_seed(seed)
    return (video + sigma * torch.randn(video.shape, generator=generator)).clamp(0, 1)


def metric(name):
    return load_metrics([name])[name]


# --- metrics of a clip ------------------------------------------------------------------------------------------------


def test_what_a_perfect_video_gets():
    video = footage(0)
    assert metric("psnr")(video, video) == math.inf
    assert metric("ssim")(video, video) == pytest.approx(1, abs=1e-6)
    assert metric("flicker")(video, video) == 0
    assert metric("relative_warping_error")(video, video) == 0


def test_psnr_is_the_mean_of_the_frames():
    target = torch.full((9, 3, 4, 4), 0.5)  # more frames than are measured at a time
    errors = torch.linspace(0.01, 0.2, 9)
    expected = sum(20 * math.log10(1 / error) for error in errors.tolist()) / 9
    assert metric("psnr")(target + errors.view(9, 1, 1, 1), target) == pytest.approx(expected, rel=1e-5)


def test_ssim_is_that_of_the_paper():
    target, video = footage(1, frames=10, size=20).double(), noisy(footage(1, frames=10, size=20), 0).double()
    line = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2)).double()
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def blur(x):
        return F.conv2d(x.flatten(0, 1)[:, None], window)

    mx, my = blur(video), blur(target)
    vx, vy, vxy = blur(video**2) - mx**2, blur(target**2) - my**2, blur(video * target) - mx * my
    index = (2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert metric("ssim")(video.float(), target.float()) == pytest.approx(index.mean().item(), abs=1e-4)


def test_flicker_is_what_alternates():
    target = 0.5 * footage(2) + 0.25
    time = torch.arange(6.0).view(6, 1, 1, 1)
    assert metric("flicker")(target + 0.1, target) == pytest.approx(0, abs=1e-6)
    assert metric("flicker")(target + 0.02 * time, target) == pytest.approx(0, abs=1e-6)
    assert metric("flicker")(target + 0.05 * (-1) ** time, target) == pytest.approx(4 * 0.05, rel=1e-5)
    loop = noisy(target, 3)
    steps = [[(loop[t + s] - target[t + s]) * w for s, w in ((-1, 1), (0, -2), (1, 1))] for t in range(1, 5)]
    expected = sum(sum(step).abs().mean().item() for step in steps) / 4
    assert metric("flicker")(loop, target) == pytest.approx(expected, rel=1e-5)


def moving(shift, frames=5, size=48):
    """A texture that moves to the right by whole pixels a frame."""
    generator = torch.Generator().manual_seed(4)
    wide = F.interpolate(torch.rand(1, 3, size // 4, size // 2, generator=generator), (size, 2 * size), mode="bicubic")
    start = size // 2
    return torch.cat([wide[..., start - i * shift : start - i * shift + size] for i in range(frames)]).clamp(0, 1)


def test_warping_error_follows_the_motion_of_the_target():
    target = moving(3)
    measure = metric("warping_error")
    assert measure(target, target) < 1e-4
    # A wrong colour that moves along costs nothing; one that flashes, or a texture that stays, does.
    assert measure(0.5 * target, target) < 1e-4
    flash = 0.1 * torch.tensor([0.0, 1, 0, 1, 0]).view(5, 1, 1, 1)
    assert measure(0.8 * target + flash, target) == pytest.approx(0.01, rel=0.05)
    assert measure(target[:1].expand_as(target), target) > 10 * measure(target, target)
    # With the flow known: pixel x of a frame is pixel x + 3 of the next.
    video = noisy(target, 5)
    by_hand = (video[1:, :, :, 3:] - video[:-1, :, :, :-3]).square().mean().item()
    assert measure(video, target) == pytest.approx(by_hand, rel=0.1)


def test_blur_has_less_warping_error_than_the_target_but_not_the_relative_one():
    target = footage(7)  # motion that a flow does not follow exactly
    blurred = F.avg_pool2d(F.pad(target, (3, 3, 3, 3), mode="replicate"), 7, 1)
    own, relative = metric("warping_error"), metric("relative_warping_error")
    assert own(blurred, target) < own(target, target)
    assert relative(blurred, target) > 1e-6 > relative(target, target) == 0
    # An error that moves along costs nothing; the same one, standing still, does.
    target, stripes = moving(3), 0.2 * moving(3)
    assert relative(target + stripes, target) < 0.01 * relative(target + stripes[:1], target)


def test_flow_is_that_of_the_clip_at_hand():
    measure, clips = metric("warping_error"), [moving(3), moving(1)]
    first, second = (measure(noisy(clip, 0), clip) for clip in clips)
    assert (measure(noisy(clips[0], 0), clips[0]), metric("warping_error")(noisy(clips[1], 0), clips[1])) == (
        first,
        second,
    )


def test_pixels_that_leave_the_frame_do_not_count():
    measure, video = metric("warping_error"), torch.rand(3, 3, 16, 20, generator=torch.Generator().manual_seed(6))
    shift = torch.zeros(1, 2, 16, 20)
    shift[:, 0] = 4.0  # to the right: those of the last four columns leave
    flows = iter([shift, -shift] * 2)
    measure.flow = lambda first, second: next(flows)
    expected = (video[1:, :, :, 4:] - video[:-1, :, :, :-4]).square().mean().item()
    assert measure(video, video) == pytest.approx(expected, rel=1e-5)
    # Covered in the next frame: where the way back does not lead here.
    back = -shift.clone()
    back[..., 10] = 0
    flows = iter([shift, back] * 2)
    video = video.clone()
    seen = [column for column in range(16) if column != 6]
    expected = (video[1:][..., [c + 4 for c in seen]] - video[:-1][..., seen]).square().mean().item()
    assert measure(video, video) == pytest.approx(expected, rel=1e-5)


def test_a_cut_has_no_warping_error(tmp_path):
    measure, video = metric("warping_error"), footage(0)
    measure.flow = lambda first, second: torch.full((1, 2, 48, 48), 3.0)  # there and back by the same way: no partner
    assert math.isnan(measure(video, video))
    table = compare(
        {"copy": target_video}, [Clip("c", "", {"target": video}, 8.0)], {"warping_error": measure}, tmp_path / "o"
    )
    assert "| copy | – |" in table.markdown()
    assert "not defined for some clips" in table.markdown()


# --- networks, with weights of their real shapes in torch.hub's cache -------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache that nothing is downloaded to."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def random_features(prefix, channels):
    """Weights of 3x3 convolutions, scaled so that activations keep their size."""
    generator = torch.Generator().manual_seed(7)
    state, before = {}, 3
    for index, after in channels.items():
        state[f"{prefix}.{index}.weight"] = (
            torch.randn(after, before, 3, 3, generator=generator) * (2 / 9 / before) ** 0.5
        )
        state[f"{prefix}.{index}.bias"] = torch.zeros(after)
        before = after
    return state


def test_lpips_with_its_published_heads(hub):
    from torchvision.models import squeezenet1_1

    torch.manual_seed(8)
    backbone = squeezenet1_1().eval()
    torch.save(backbone.state_dict(), hub / "squeezenet1_1-b8a52dc0.pth")
    video, target = noisy(footage(3, frames=9), 1), footage(3, frames=9)
    measure = metric("lpips:squeeze")
    assert measure(target, target) == 0

    import lpips  # the authors' own

    heads = torch.load(
        Path(lpips.__file__).parent / "weights" / "v0.1" / "squeeze.pth", map_location="cpu", weights_only=True
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    pair, total = [(2 * x - 1 - mean) / std for x in (video, target)], 0.0
    start = 0
    with torch.no_grad():
        for head, stop in enumerate([2, 5, 8, 10, 11, 12, 13]):
            pair = [backbone.features[start:stop](x) for x in pair]
            unit = [x / x.square().sum(1, keepdim=True).sqrt() for x in pair]
            total += F.conv2d((unit[0] - unit[1]) ** 2, heads[f"lin{head}.model.1.weight"]).mean().item()
            start = stop
    assert measure(video, target) == pytest.approx(total, rel=1e-3)


def test_dists_with_its_published_weights(hub):
    # The classifier, which is most of VGG16, is not used: zeros, stored as one number each.
    state = random_features(
        "features",
        {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512},
    )
    for index, shape in ((0, (4096, 25088)), (3, (4096, 4096)), (6, (1000, 4096))):
        state[f"classifier.{index}.weight"] = torch.zeros(1, 1).expand(shape)
        state[f"classifier.{index}.bias"] = torch.zeros(1).expand(shape[0])
    torch.save(state, hub / "vgg16-397923af.pth")
    target = footage(4, frames=3, size=32)
    measure = metric("dists")
    assert measure(target, target) == pytest.approx(0, abs=1e-5)
    slightly, badly = (measure(noisy(target, 2, sigma), target) for sigma in (0.02, 0.2))
    assert 0 < slightly < badly < 1
    from torchmetrics.functional.image import deep_image_structure_and_texture_similarity as dists

    video = noisy(target, 2)
    assert measure(video, target) == pytest.approx(dists(video, target).mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["lpips", "dists", "warping_error:raft_small"])
def test_weights_that_are_not_there_are_one_sentence(hub, name):
    with pytest.raises(UsageError, match="no network") as error:
        metric(name)
    assert "\n" not in str(error.value)


def test_raft_takes_the_place_of_the_flow(hub):
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(9)
    model = raft_small().eval()
    with torch.no_grad():  # random, but it says that nothing moves
        model.update_block.flow_head.conv2.weight.zero_()
        model.update_block.flow_head.conv2.bias.zero_()
    torch.save(model.state_dict(), hub / "raft_small_C_T_V2-01064c6d.pth")
    video, target = noisy(moving(3), 3), moving(3)
    expected = (video[1:] - video[:-1]).square().mean().item()
    assert metric("warping_error:raft_small")(video, target) == pytest.approx(expected, rel=1e-4)


# --- Fréchet distance -------------------------------------------------------------------------------------------------


def test_the_distance_is_that_of_the_formula():
    generator = torch.Generator().manual_seed(10)
    mixing = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    first = torch.randn(40, 5, generator=generator, dtype=torch.float64) @ mixing
    second = torch.randn(30, 5, generator=generator, dtype=torch.float64) + 1
    covariances = [x.T.cov() for x in (first, second)]
    values, vectors = torch.linalg.eig(covariances[0] @ covariances[1])
    root = (vectors @ torch.diag(values.sqrt()) @ torch.linalg.inv(vectors)).real
    torch.testing.assert_close(root @ root, covariances[0] @ covariances[1])
    trace = (covariances[0] + covariances[1] - 2 * root).trace()
    expected = (first.mean(0) - second.mean(0)).square().sum() + trace
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    # Equal covariances leave the distance of the means; fewer clips than features are no trouble.
    few = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    assert frechet_distance(few, few + 0.5) == pytest.approx(20 * 0.25, rel=1e-9)
    with pytest.raises(UsageError, match="at least 2 clips"):
        frechet_distance(few[:1], few)


@pytest.fixture
def videomae(tmp_path):
    from transformers import VideoMAEConfig, VideoMAEModel

    torch.manual_seed(11)
    config = VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    VideoMAEModel(config).save_pretrained(tmp_path / "videomae")
    return tmp_path / "videomae"


def test_features_of_videomae(videomae):
    from transformers import VideoMAEModel

    measure = metric(f"fvd:videomae:{videomae}")
    video = footage(5, frames=10, size=32)
    model = VideoMAEModel.from_pretrained(videomae).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        expected = model(((video[[0, 3, 6, 9]] - mean) / std)[None]).last_hidden_state.mean(1)[0]
    torch.testing.assert_close(measure.features(video).float(), expected)
    assert measure.features(video[:2]).shape == (16,)  # too short: frames are repeated
    assert "do not fill the covariance of 16" in measure.note(torch.zeros(3, 16))
    assert "covariance" not in measure.note(torch.zeros(17, 16))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_features_of_i3d_are_asked_for_as_its_file_wants(tmp_path):
    class Published(torch.nn.Module):
        """The call of the published file, and features that tell what came."""

        def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
            assert rescale and resize and return_features  # noqa: PT018
            return torch.cat([x.mean((2, 3, 4)), x[:, 0, :, 0, 0]], dim=1)

    torch.jit.script(Published()).save(str(tmp_path / "i3d.pt"))
    measure = metric(f"fvd:i3d:{tmp_path / 'i3d.pt'}")
    video = footage(6, frames=10, size=16)
    expected = torch.cat([video.mean((0, 2, 3)), video[:, 0, 0, 0]]) * 255
    torch.testing.assert_close(measure.features(video).float(), expected, atol=0.5, rtol=0)
    with pytest.raises(UsageError, match="10 or more frames, got 9"):
        measure.features(video[:9])


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ("fvd", "must name its feature network"),
        ("fvd:resnet:here", "must name its feature network"),
        ("fvd:videomae:nowhere/at/all", "cannot be loaded"),
        ("fvd:i3d:nowhere.pt", "cannot be loaded"),
        ("lpips:resnet", "expected one of alex"),
        ("warping_error:horn", "expected dis, raft"),
        ("seams", "expected seams:WINDOW:OVERLAP"),
        ("seams:17:17", "an overlap from 1 to 16"),
        ("psnr:y", "no choices"),
        ("dists:vgg", "no choices"),
        ("pnsr", "did you mean 'psnr'"),
    ],
)
def test_wrong_names_are_one_sentence(choice, says):
    with pytest.raises(UsageError, match=says) as error:
        load_metrics([choice])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "video"),
    [
        ("ssim", torch.zeros(1, 3, 10, 30)),
        ("flicker", torch.zeros(2, 3, 16, 16)),
        ("warping_error", torch.zeros(1, 3, 32, 32)),
        ("warping_error", torch.zeros(3, 3, 8, 32)),
    ],
)
def test_clips_that_are_too_small_or_short(name, video):
    with pytest.raises(UsageError, match=f"{name} needs .* or more frames"):
        metric(name)(video, video)


def test_a_jump_where_windows_meet_is_a_seam():
    target, measure = footage(3, frames=29), metric("seams:17:5")
    video = noisy(target, 3, 0.02)
    assert measure(video, target) == pytest.approx(1, abs=0.1)
    jump = video.clone()
    jump[14:] += 0.5
    assert measure(jump, target) > 3
    elsewhere = video.clone()
    elsewhere[5:] += 0.5
    assert measure(elsewhere, target) < 0.6
    assert math.isnan(measure(video[:17], target[:17]))
    assert math.isnan(measure(target, target))


# --- tables -----------------------------------------------------------------------------------------------------------


def test_estimates():
    found = estimate([1.0, 2.0, math.nan, 6.0])
    assert found.mean == 3
    assert found.count == 3
    assert found.stderr == pytest.approx(math.sqrt(7 / 3))
    assert str(found) == "3.0 ± 1.5"
    assert paired_difference([2.0, 4.0], [1.0, 2.0]).text("+") == "+1.50 ± 0.50"
    assert str(estimate([math.inf, 1.0])) == "inf"
    assert str(estimate([])) == "–"
    assert str(Estimate(31.23456, math.nan, 1)) == "31.23"
    assert str(Estimate(0.0012345, 0.0000567, 9)) == "0.001234 ± 0.000057"
    assert Estimate(7.3e-5, 1.53e-5, 9).text("+") == "(+7.3 ± 1.5)e-05"
    assert str(Estimate(1.0, 1e-8, 9)) == "1"  # rounding
    assert str(Estimate(812.3, 45.6, 9)) == "812 ± 46"


# --- comparisons ------------------------------------------------------------------------------------------------------


def clips(count=4, size=48, **roles):
    for index in range(count):
        target = footage(20 + index, size=size)
        videos = {"target": target, "degraded": noisy(target, index, 0.2), **roles}
        yield Clip(f"folder/clip {index}.mp4", f"a <clip> & {index}", videos, 8.0)


def better(clip):
    return (clip.videos["degraded"] + clip.videos["target"]) / 2


def test_what_a_comparison_writes(tmp_path):
    out = tmp_path / "deep" / "out"
    methods = {"input": input_video, "half": better, "target": target_video}
    table = compare(methods, clips(), load_metrics(FORMULAS), out, videos=3)

    with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["index"], row["method"]) for row in rows] == [(str(i), m) for i in range(4) for m in methods]
    assert rows[0]["clip"] == "folder/clip 0.mp4"
    values = {m: [float(row["psnr"]) for row in rows if row["method"] == m] for m in methods}
    for clip, written in zip(clips(), values["half"], strict=True):
        assert written == pytest.approx(metric("psnr")(better(clip), clip.videos["target"]), rel=1e-9)
    assert values["target"] == [math.inf] * 4

    text = (out / "table.md").read_text(encoding="utf-8")
    assert text == table.markdown()
    assert "| method | psnr ↑ | ssim ↑ | warping_error ↓ | relative_warping_error ↓ | flicker ↓ |" in text
    assert f"| half | **{estimate(values['half'])}** |" in text
    assert f"| half | {paired_difference(values['half'], values['input']).text('+')} |" in text
    # Half the error is 6.02 dB, of every clip (where no pixel is cut off): the paired difference knows it closely.
    assert paired_difference(values["half"], values["input"]).mean == pytest.approx(6.02, abs=0.01)
    assert paired_difference(values["half"], values["input"]).stderr < 0.01 < estimate(values["half"]).stderr
    assert "| target | inf |" in text
    assert "| input |" not in text.partition("Difference to input")[2]

    videos = sorted((out / "videos").iterdir())
    assert [path.name for path in videos] == [f"{i:03}-folder-clip-{i}.mp4" for i in range(3)]
    shown, fps = read_video(videos[0])
    assert fps == 8
    assert len(shown) == 6
    expected = side_by_side(
        {"input": next(clips()).videos["degraded"], "half": torch.zeros(6, 3, 48, 48), "t": shown[:, :, :48, :48]}
    )
    assert shown.shape == expected.shape

    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("data:video/mp4;base64,") == 3
    assert page.count("data:image/png;base64,") == 3  # of `half`, where it gains most; it loses nowhere
    assert "a &lt;clip&gt; &amp; 0" in page
    assert not re.search(r"<link|(src|href)=\"(?!data:)|url\(", page)  # self-contained
    assert "half: details against input" in page


def test_one_method_without_degraded_videos(tmp_path):
    def bare():
        for clip in clips(2):
            yield Clip(clip.name, "", {"target": clip.videos["target"]}, 8.0)

    table = compare(
        {"flat": lambda clip: torch.zeros_like(clip.videos["target"])}, bare(), load_metrics(["psnr"]), tmp_path / "o"
    )
    assert "Difference" not in table.markdown()
    assert "**" not in table.markdown()
    assert "has the least error" in (tmp_path / "o" / "index.html").read_text(encoding="utf-8")


def test_crops_are_where_the_error_is(tmp_path):
    from chopgrad_align.evaluation.crops import CropSearch

    target = torch.full((3, 3, 64, 96), 0.5)
    base, mine = target + 0.1, target.clone() + 0.1
    mine[1, :, 32:, 64:] = 0.5  # right here
    mine[2, :, :32, :32] = 0.9  # wrong here
    search = CropSearch("mine", "base", most=1)
    search.look("dull", {"base": base, "mine": base}, target)
    search.look("a", {"base": base, "mine": mine}, target)
    (best,), (worst,) = search.best, search.worst
    assert (best.clip, best.frame, worst.clip, worst.frame) == ("a", 1, "a", 2)
    assert best.error == pytest.approx(0, abs=1e-9)
    assert best.reference_error == pytest.approx(0.01, rel=1e-4)
    assert worst.error == pytest.approx(0.16, rel=1e-4)
    torch.testing.assert_close(best.pictures["mine"], target[:1, :, :32, :32])
    assert set(best.pictures) == {"base", "mine", "target"}


def test_fvd_of_a_comparison(tmp_path, videomae):
    name = f"fvd:videomae:{videomae}"
    table = compare(
        {"input": input_video, "target": target_video}, clips(), load_metrics(["psnr", name]), tmp_path / "o"
    )
    figures = {method: cells[1].text for method, cells in table.rows}
    assert float(figures["input"]) > float(figures["target"]) == pytest.approx(0, abs=1e-6)
    features = [torch.stack([metric(name).features(c.videos[r]) for c in clips()]) for r in ("degraded", "target")]
    assert float(figures["input"]) == pytest.approx(frechet_distance(*features), rel=1e-3)
    assert "do not compare" in table.markdown()
    with open(tmp_path / "o" / "metrics.csv", encoding="utf-8") as file:
        assert file.readline().strip() == "index,clip,method,psnr"
    with pytest.raises(UsageError, match="at least 2 clips"):
        compare({"input": input_video}, clips(1), load_metrics([name]), tmp_path / "one")


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (lambda clip: clip.videos["target"][1:], r"method 'bad' on clip 'folder/clip 0.mp4': .*\(6, 3, 48, 48\)"),
        (lambda clip: clip.videos["target"] * math.nan, "expected pixels in"),
        (lambda clip: clip.videos["target"] * 255, "expected pixels in"),
    ],
)
def test_predictions_that_are_none(tmp_path, method, says):
    with pytest.raises(UsageError, match=says):
        compare({"bad": method}, clips(1), load_metrics(["psnr"]), tmp_path / "o")


def test_what_is_wrong_before_anything_is_written(tmp_path):
    methods, metrics = {"input": input_video}, load_metrics(["psnr"])
    with pytest.raises(UsageError, match="exists, and nothing is overwritten"):
        compare(methods, clips(), metrics, tmp_path)
    with pytest.raises(UsageError, match="reference 'base' is not one"):
        compare(methods, clips(), metrics, tmp_path / "o", reference="base")
    with pytest.raises(UsageError, match="at least one method"):
        compare({}, clips(), metrics, tmp_path / "o")
    assert not (tmp_path / "o").exists()
    with pytest.raises(UsageError, match="no clips"):
        compare(methods, [], metrics, tmp_path / "empty")
    with pytest.raises(UsageError, match="no target"):
        compare(methods, [Clip("c", "", {"degraded": torch.zeros(1, 3, 8, 8)}, 8.0)], metrics, tmp_path / "none")


def test_side_by_side():
    red, blue = torch.zeros(2, 3, 10, 12), torch.zeros(2, 3, 10, 12)
    red[:, 0], blue[1, 2] = 1, 1
    sheet = side_by_side({"red": red, "a name that is far too long for its little video " * 2: blue}, narrowest=48)
    height, width = 10 * 4, 12 * 4
    assert sheet.shape[3] == 2 * width + 4
    assert torch.equal(sheet[:, :, -height:, :width][:, 0], torch.ones(2, height, width))
    assert sheet[0, :, -height:, -width:].max() == 0
    assert sheet[1, 2, -height:, -width:].min() == 1
    band = sheet[0, 0, :-height]
    assert band[:, :width].max() > 0.8  # a name is there
    assert band[:, width : width + 4].max() < 0.2  # and none runs over
    # Five of 960 do not fit into one row of 3840: two rows of three.
    assert side_by_side({str(i): torch.zeros(1, 3, 8, 960) for i in range(5)}).shape[3] == 3 * 960 + 2 * 4


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Targets, and restored ones: a file each, and one that is a folder of frames."""
    monkeypatch.chdir(tmp_path)
    for index in range(2):
        video = footage(30 + index, frames=4, size=32)
        write_video(tmp_path / "targets" / "deep" / f"{index}.mp4", video, fps=8)
        write_video(tmp_path / "restored" / "deep" / f"{index}.mp4", noisy(video, index, 0.02), fps=8)
    write_video(tmp_path / "restored" / "more.mp4", video, fps=8)
    (tmp_path / "frames" / "deep").mkdir(parents=True)
    for index in range(2):
        folder = tmp_path / "frames" / "deep" / str(index)
        folder.mkdir()
        for frame, pixels in enumerate(read_video(tmp_path / "targets" / "deep" / f"{index}.mp4")[0]):
            Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy()).save(folder / f"{frame}.png")
    return tmp_path


def test_folders_of_videos(folders, monkeypatch, capsys):
    status, said, _ = run_script(
        "evaluate.py", monkeypatch, capsys, "--pred", "restored", "--pred", "copies=frames", "--target", "targets",
        "--out", "out", "--metrics", "psnr", "ssim",
    )  # fmt: skip
    assert status == 0
    assert "| restored |" in said
    with open("out/metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["clip"], row["method"]) for row in rows[:2]] == [("deep/0", "restored"), ("deep/0", "copies")]
    expected = metric("psnr")(*(read_video(f"{folder}/deep/0.mp4")[0] for folder in ("restored", "targets")))
    assert float(rows[0]["psnr"]) == pytest.approx(expected, rel=1e-6)
    assert float(rows[1]["psnr"]) > 50  # rounded to 8 bit

    status, _, error = run_script(
        "evaluate.py", monkeypatch, capsys, "--pred", "restored", "--target", "targets", "--out", "out"
    )
    assert status == 2
    assert "nothing is overwritten" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--pred", "targets", "--target", "restored"], "no video called 'more'"),
        (["--pred", "nowhere", "--target", "restored"], "no folder nowhere"),
        (["--pred", "restored"], "either --config"),
        ([], "either --config"),
        (["--config", "a.yaml", "--pred", "restored", "--target", "targets"], "either --config"),
        (["--pred", "restored", "--target", "targets", "--count", "0"], "--count"),
        (["--pred", "restored", "--pred", "restored", "--target", "targets"], "another name each time"),
        (["--pred", "restored", "--target", "targets", "run.seed=1"], "belong to --config"),
        (["--config", "a.yaml", "--method", "mine=nowhere"], "there is no nowhere"),
        (["--config", "a.yaml", "--method", "base=restored"], "name of a baseline"),
    ],
)
def test_wrong_arguments(folders, monkeypatch, capsys, arguments, says):
    status, _, error = run_script("evaluate.py", monkeypatch, capsys, *arguments, "--out", "out")
    assert status == 2
    assert says in error
    assert len(error.splitlines()) == 1
    assert not Path("out").exists()


def test_a_config_with_its_held_out_clips(folders, monkeypatch, capsys):
    """The script asks the training side for clips and methods, and gives each method its LoRA."""
    import types

    asked = []

    def restorers(config, loras, partial):
        assert not partial
        asked.append((config, loras))
        return {name: input_video if lora is None else better for name, lora in loras.items()}

    module = types.ModuleType("chopgrad_align.training.predictors")
    module.restorers = restorers
    module.HeldOutClips = lambda config, count: list(clips(count))
    monkeypatch.setitem(sys.modules, "chopgrad_align.training.predictors", module)
    monkeypatch.setattr(
        "chopgrad_align.training.config_file.load_config", lambda path, overrides: (path, tuple(overrides))
    )
    (folders / "run" / "lora").mkdir(parents=True)
    status, said, _ = run_script(
        "evaluate.py", monkeypatch, capsys, "--config", "c.yaml", "--method", "mine=run", "--out", "out",
        "--metrics", "psnr", "--reference", "base", "--count", "3", "train.steps=1",
    )  # fmt: skip
    assert status == 0
    config = ("c.yaml", ("train.steps=1",))
    assert asked == [(config, {"base": None, "mine": Path("run/lora")})]
    assert "over 3 clips" in said
    assert "Difference to base" in said
    assert re.search(r"\| mine \| \+6\.02", said)

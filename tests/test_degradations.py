"""Degradations and masks: seeded, in range, and each does what it says, as measured."""

import math

import pytest
import torch
import torch.nn.functional as F

from chopgrad_align.common.errors import UsageError
from chopgrad_align.data.degradations import DEGRADATIONS, MASKS, load_degradation, load_mask
from chopgrad_align.data.degradations.base import Chain, Maybe, OneOf
from chopgrad_align.data.degradations.blur import Blur, Sinc
from chopgrad_align.data.degradations.boxes import BoxMask
from chopgrad_align.data.degradations.compression import Jpeg, VideoCodec
from chopgrad_align.data.degradations.drift import bouncing_path, drifting_field
from chopgrad_align.data.degradations.floaters import Floaters
from chopgrad_align.data.degradations.ghosting import Ghosting
from chopgrad_align.data.degradations.holes import Holes
from chopgrad_align.data.degradations.mask_videos import MaskVideos
from chopgrad_align.data.degradations.masks import covered
from chopgrad_align.data.degradations.noise import GaussianNoise, PoissonNoise
from chopgrad_align.data.degradations.objects import ObjectMask
from chopgrad_align.data.degradations.resize import Downscale
from chopgrad_align.data.degradations.second_order import SecondOrder, Stage
from chopgrad_align.data.degradations.strokes import StrokeMask
from chopgrad_align.data.procedural import texture_clip
from chopgrad_align.data.video import write_video

MASK = ObjectMask(area=(0.1, 0.2), travel=(0.2, 0.2))  # of the mask videos


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def video():
    """A textured clip that moves, of no square shape."""
    return texture_clip(seed=3, frames=7, size=96).transpose(0, 1)[..., :80].contiguous()


@pytest.fixture(scope="module")
def still():
    return texture_clip(seed=3, frames=1, size=64).transpose(0, 1).expand(6, -1, -1, -1).contiguous()


def psnr(a, b):
    return -10 * torch.log10((a - b).square().mean()).item()


def laplacian_energy(video):
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(3, 1, 3, 3)
    return F.conv2d(video, kernel, groups=3).square().mean().item()


def flat(value, frames=6, size=64):
    return torch.full((frames, 3, size, size), value)


ALL = [{"name": name} for name in DEGRADATIONS if name not in ("maybe", "one_of")]
ALL += [
    {"name": "maybe", "part": {"name": "jpeg"}},
    {"name": "one_of", "choices": [{"name": "blur"}, {"name": "gaussian_noise"}]},
    [{"name": "blur"}, {"name": "downscale", "filter": "area"}, {"name": "poisson_noise"}],
    {"name": "video_codec", "codec": "mpeg4", "crf": [5, 31]},
]


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec["name"] if isinstance(spec, dict) else "chain")
def test_every_degradation_is_seeded_and_stays_in_range(video, spec):
    degradation, before = load_degradation(spec), video.clone()
    results = [degradation.degrade(video, seeded(seed)) for seed in (1, 1, 2, 3)]
    assert torch.equal(video, before)
    assert torch.equal(results[0], results[1])
    for result in results:
        assert result.dtype == torch.float32
        assert result.shape[:2] == video.shape[:2]
        assert 0 <= result.min() <= result.max() <= 1
    if spec != {"name": "downscale"}:  # by default always by 4
        assert any(results[0].shape != r.shape or not torch.equal(results[0], r) for r in results[2:])
    assert degradation == load_degradation(spec)


# --- blur, resize, noise ----------------------------------------------------------------------------------------------


def test_blur_takes_detail_and_a_wider_one_more(video):
    energies = [laplacian_energy(Blur(sigma=(s, s)).degrade(video, seeded())) for s in (0.5, 1.0, 2.0)]
    assert laplacian_energy(video) > energies[0] > energies[1] > energies[2] > 0
    assert energies[2] < 0.05 * laplacian_energy(video)


@pytest.mark.parametrize("shapes", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_blur_kernels_are_averages_of_the_width_they_say(shapes):
    blur = Blur(sigma=(2.0, 2.0), shapes=shapes, generalised_power=(1.0, 1.0), plateau_power=(2.0, 2.0))
    kernel = blur.kernel(seeded())
    assert kernel.min() >= 0
    assert kernel.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(kernel, kernel.flip(0, 1))
    axis = torch.arange(len(kernel)) - len(kernel) // 2
    spread = (kernel.sum(0) * axis**2).sum().sqrt().item()
    assert spread == pytest.approx(2.0, rel=0.03) if shapes[2] == 0 else 1 < spread < 4


def test_anisotropic_blur_has_two_widths():
    kernels = [Blur(sigma=(0.5, 4.0), isotropic=0.0, shapes=(1, 0, 0)).kernel(seeded(s)) for s in range(20)]

    def elongation(kernel):
        axis = torch.arange(len(kernel)) - len(kernel) // 2
        y, x = torch.meshgrid(axis.float(), axis.float(), indexing="ij")
        moments = torch.tensor([[(kernel * a * b).sum() for a in (x, y)] for b in (x, y)])
        low, high = torch.linalg.eigvalsh(moments)
        return (high / low).sqrt().item()

    assert max(map(elongation, kernels)) > 2.5
    assert elongation(Blur(sigma=(3.0, 3.0), isotropic=1.0, shapes=(1, 0, 0)).kernel(seeded())) < 1.01


def test_blur_and_sinc_are_the_same_in_every_frame_and_keep_flat_pictures(still):
    for degradation in (Blur(), Sinc()):
        result = degradation.degrade(still, seeded())
        assert (result - result[:1]).abs().max() < 1e-6
        assert (degradation.degrade(flat(0.3), seeded()) - 0.3).abs().max() < 1e-5
    tiny = torch.rand(2, 3, 5, 4)
    assert Blur(sigma=(3.0, 3.0)).degrade(tiny, seeded()).shape == tiny.shape


def test_sinc_rings_beside_an_edge_and_blur_does_not():
    edge = flat(0.3, 1)
    edge[..., 32:] = 0.7
    ringing = Sinc(cutoff=(math.pi / 3, math.pi / 3)).degrade(edge, seeded())
    assert 0.72 < ringing.max() < 0.8
    assert 0.2 < ringing.min() < 0.28
    assert Blur().degrade(edge, seeded()).max() <= 0.7 + 1e-5


def test_downscale_has_the_size_and_the_area_s_mean(video):
    assert Downscale((4, 4)).degrade(video, seeded()).shape == (7, 3, 24, 20)
    small = Downscale((2, 2), filter="area").degrade(video, seeded())
    assert torch.allclose(small[:, :, 5, 7], video[:, :, 10:12, 14:16].mean((2, 3)), atol=1e-6)
    sizes = {Downscale((2, 4)).degrade(video, seeded(s)).shape[2] for s in range(10)}
    assert len(sizes) > 4
    assert min(sizes) >= 24
    assert max(sizes) <= 48
    # No aliasing: a pattern finer than the new pixels becomes its mean.
    stripes = (torch.arange(64) % 2).float().expand(1, 3, 64, 64)
    assert (Downscale((4, 4)).degrade(stripes, seeded())[..., 2:-2] - 0.5).abs().max() < 0.05


def test_gaussian_noise_has_its_level_and_is_new_in_every_frame():
    result = GaussianNoise(sigma=(0.05, 0.05), grey=0.0).degrade(flat(0.5), seeded()) - 0.5
    assert result.std().item() == pytest.approx(0.05, rel=0.03)
    assert result.mean().abs() < 1e-3
    correlation = torch.corrcoef(torch.stack([result[0].flatten(), result[1].flatten(), result[2].flatten()]))
    assert (correlation - torch.eye(3)).abs().max() < 0.05
    assert abs(torch.corrcoef(result[0].flatten(1))[0, 1]) < 0.05
    grey = GaussianNoise(grey=1.0).degrade(flat(0.5), seeded())
    assert torch.equal(grey[:, :1].expand(-1, 3, -1, -1), grey)
    levels = [GaussianNoise().degrade(flat(0.5), seeded(s)).std(dim=(1, 2, 3)) for s in range(5)]
    assert all(level.max() / level.min() < 1.1 for level in levels)  # one level a clip
    assert torch.stack(levels).mean(1).std() > 0.01


def test_poisson_noise_grows_with_the_light():
    noise = PoissonNoise(sigma=(0.1, 0.1), grey=0.0)
    for value in (0.1, 0.4, 0.6):
        result = noise.degrade(flat(value), seeded())
        assert result.std().item() == pytest.approx(0.1 * math.sqrt(value), rel=0.05)
        assert result.mean().item() == pytest.approx(value, abs=2e-3)
    assert torch.equal(noise.degrade(flat(0.0), seeded()), flat(0.0))
    grey = PoissonNoise(grey=1.0).degrade(flat(0.5), seeded())
    assert torch.equal(grey[:, :1].expand(-1, 3, -1, -1), grey)


# --- codecs -----------------------------------------------------------------------------------------------------------


def test_lower_jpeg_quality_loses_more(video):
    quality = [psnr(Jpeg((q, q)).degrade(video, seeded()), video) for q in (95, 50, 10)]
    assert quality[0] > quality[1] + 2 > quality[2] + 4
    # Blocks: with a low quality, steps at their borders are larger than others.
    steps = Jpeg((5, 5)).degrade(video, seeded()).mean(1).diff(dim=2).abs().mean((0, 1))
    assert steps[7::8].mean() > 1.5 * steps.mean()


@pytest.mark.parametrize(("codec", "factors"), [("h264", (15, 28, 45)), ("mpeg4", (2, 8, 31))])
def test_stronger_video_compression_loses_more(video, codec, factors):
    quality = [psnr(VideoCodec((f, f), codec).degrade(video, seeded()), video) for f in factors]
    assert quality[0] > quality[1] + 2 > quality[2] + 4
    assert quality[0] > 30


def test_video_compression_keeps_colours_and_odd_sizes(video):
    odd = video[..., :63, :61]
    result = VideoCodec((10, 10)).degrade(odd, seeded())
    assert result.shape == odd.shape
    assert psnr(result, odd) > 32
    for colour in ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.8, 0.2, 0.4)):
        picture = torch.tensor(colour).view(1, 3, 1, 1).expand(3, 3, 32, 32)
        for codec in ("h264", "mpeg4"):
            assert (VideoCodec((5, 5), codec).degrade(picture, seeded()) - picture).abs().max() < 0.02


def test_video_compression_works_between_frames(still):
    """What stands still costs nothing after the first frame, so that an encoder spends less, and loses less, there."""
    moving = torch.stack([frame.roll((3 * i, 5 * i), (1, 2)) for i, frame in enumerate(still)])
    codec = VideoCodec((35, 35))
    assert (codec.degrade(still, seeded()).diff(dim=0)).abs().mean() < 0.01
    per_frame = torch.cat([codec.degrade(frame[None], seeded()) for frame in moving])
    assert not torch.allclose(per_frame, codec.degrade(moving, seeded()), atol=0.05)


# --- second order -----------------------------------------------------------------------------------------------------


def test_second_order_has_its_size_and_is_worse_than_its_last_part(video):
    plain = psnr(F.interpolate(Downscale().degrade(video, seeded()), video.shape[2:], mode="bicubic"), video)
    results = [SecondOrder().degrade(video, seeded(seed)) for seed in range(8)]
    assert {tuple(r.shape) for r in results} == {(7, 3, 24, 20)}
    quality = [psnr(F.interpolate(r, video.shape[2:], mode="bicubic"), video) for r in results]
    assert max(quality) < plain
    assert max(quality) - min(quality) > 1
    assert SecondOrder(factor=1.0).degrade(video[..., :-1], seeded()).shape == (7, 3, 96, 79)


def test_a_stage_without_chances_does_nothing(video):
    stage = Stage(
        blur_probability=0.0,
        sinc_probability=0.0,
        resize=(0, 0, 1),
        gaussian=GaussianNoise((0.0, 0.0)),
        gaussian_probability=1.0,
    )
    assert torch.equal(stage.degrade(video, (96, 80), seeded()), video)
    only_larger = Stage(resize=(1, 0, 0), scale=(0.5, 1.5))
    heights = [only_larger.degrade(video, (24, 20), seeded(s)).shape[2] for s in range(8)]
    assert 24 <= min(heights) < max(heights) <= 36


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mask_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    for seed in range(2):
        write_video(folder / f"{seed}.mp4", MASK.draw(5, 48, 64, seeded(seed)).expand(-1, 3, -1, -1), fps=8)
    return folder


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_is_seeded_binary_and_moves_smoothly(name, mask_folder):
    mask = load_mask({"name": name, **({"folder": str(mask_folder)} if name == "videos" else {})})
    changes, areas = [], []
    for seed in range(12):
        drawn = mask.draw(17, 70, 90, seeded(seed))
        assert drawn.shape == (17, 1, 70, 90)
        assert set(drawn.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(drawn, mask.draw(17, 70, 90, seeded(seed)))
        changes.append(drawn.diff(dim=0).abs().mean((1, 2, 3)))
        areas.append(drawn.mean().item())
    changes = torch.stack(changes)
    assert changes.mean() > 0.002  # they move
    assert changes.max() < 0.25 * max(areas) + 0.05  # and never jump
    assert len({round(area, 4) for area in areas}) > (1 if name == "videos" else 10)


@pytest.mark.parametrize("size", [(64, 64), (45, 111), (120, 50)])
def test_boxes_are_boxes_of_an_area_in_their_range(size):
    for seed in range(30):
        drawn = BoxMask(area=(0.1, 0.3)).draw(9, *size, seeded(seed))[:, 0]
        areas = drawn.mean((1, 2))
        assert 0.09 < areas.min() <= areas.max() < 0.32
        assert torch.equal(drawn, drawn.amax(1, keepdim=True) * drawn.amax(2, keepdim=True))  # a product of intervals
        for frame in drawn:
            for side in (0, 1):
                line = frame.amax(side)
                assert (line.diff() != 0).sum() <= 2
                assert line.sum() == drawn[0].amax(side).sum()  # of one size in all frames
    assert BoxMask(area=(1.0, 1.0)).draw(2, *size, seeded()).all()


def test_box_travel_is_how_far_it_goes():
    standing = BoxMask(travel=(0.0, 0.0)).draw(9, 64, 64, seeded())
    assert not standing.diff(dim=0).any()
    drawn = BoxMask(area=(0.02, 0.02), aspect=(1.0, 1.0), travel=(0.3, 0.3)).draw(9, 100, 100, seeded(1))[:, 0]
    places = torch.stack([torch.nonzero(frame).float().mean(0) for frame in drawn])
    steps = places.diff(dim=0).norm(dim=1)
    assert steps.sum().item() == pytest.approx(30, abs=4)
    assert steps.max() < 6


def test_strokes_cover_what_is_asked_and_are_as_wide_as_the_brush():
    for seed in range(10):
        mask = StrokeMask(area=(0.15, 0.25)).draw(3, 96, 128, seeded(seed))
        assert 0.15 <= mask[0].mean() < 0.40
    thin = StrokeMask(area=(0.05, 0.05), brush=(0.06, 0.06)).draw(1, 96, 96, seeded())
    shrunk = 1 - F.max_pool2d(1 - thin, 9, stride=1, padding=4)  # by more than half of the width
    assert thin.mean() > 0.04
    assert shrunk.mean() < 0.003


def test_objects_have_their_area_and_count():
    areas = [ObjectMask(count=(1, 1), area=(0.05, 0.05), travel=(0, 0)).draw(2, 96, 128, seeded(s)) for s in range(20)]
    inside = [a.mean().item() for a in areas]
    assert sum(inside) / len(inside) == pytest.approx(0.05, rel=0.2)  # some lie over an edge
    assert max(inside) < 0.056
    many = ObjectMask(count=(6, 6), area=(0.02, 0.02)).draw(2, 96, 128, seeded())
    assert 0.05 < many.mean() < 0.125


def test_given_mask_videos_are_taken_as_they_are(mask_folder, tmp_path):
    wanted = [MASK.draw(5, 48, 64, seeded(seed)) for seed in range(2)]
    wanted += [w.flip(3) for w in wanted]
    there_and_back = [0, 1, 2, 3, 4, 3, 2, 1, 0, 1, 2]
    found = set()
    for seed in range(16):
        drawn = MaskVideos(str(mask_folder)).draw(11, 48, 64, seeded(seed))
        distances = [(drawn - w[there_and_back]).abs().mean().item() for w in wanted]
        assert min(distances) < 0.01
        found.add(distances.index(min(distances)))
    assert found == {0, 1, 2, 3}
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(UsageError, match=r"bad file a\.mp4"):
        MaskVideos(str(tmp_path)).draw(2, 8, 8, seeded())


def test_covered_is_grey_under_the_mask(video):
    mask = BoxMask().draw(7, 96, 80, seeded())
    result = covered(video, mask)
    assert (result[mask.expand_as(result) == 1] == 0.5).all()
    assert torch.equal(result[mask.expand_as(result) == 0], video[mask.expand_as(result) == 0])


# --- rendering artefacts ----------------------------------------------------------------------------------------------


def test_floaters_hide_a_part_of_the_scene_and_move(still):
    changed = []
    for seed in range(6):
        difference = (Floaters().degrade(still, seeded(seed)) - still).abs().amax(1)
        changed.append((difference > 0.02).float().mean().item())
        frames = difference.flatten(1)
        assert not torch.allclose(frames[0], frames[-1], atol=0.01)
        # From one frame to the next they overlap more than from the first to the last.
        near = torch.corrcoef(frames[:2])[0, 1]
        far = torch.corrcoef(frames[[0, -1]])[0, 1]
        assert near > far
    assert 0.01 < min(changed) < max(changed) < 0.9
    clear = Floaters(opacity=(0.0, 0.0)).degrade(still, seeded())
    assert torch.equal(clear, still)


def test_holes_have_their_area_and_show_one_background():
    for seed in range(6):
        scene = flat(0.25, 5, 96)
        result = Holes(area=(0.1, 0.1), travel=(0.25, 0.25)).degrade(scene, seeded(seed))
        hole = (result - scene).abs().mean(1)
        extreme = hole.max()
        part = (hole > extreme / 2).float().mean((1, 2))
        assert ((part > 0.08) & (part < 0.12)).all()
        assert any(abs(extreme - abs(0.25 - grey)) < 0.01 for grey in (0.0, 0.5, 1.0))
        assert (hole[0] - hole[-1]).abs().mean() > 0.02  # they move


def test_ghosts_are_copies_elsewhere(still):
    result = Ghosting().degrade(still, seeded())
    assert 15 < psnr(result, still) < 40
    assert torch.allclose(Ghosting().degrade(flat(0.4), seeded()), flat(0.4), atol=1e-5)
    point = flat(0.0, 3)
    point[:, :, 30:34, 30:34] = 1.0
    ghost = Ghosting(copies=(1, 1), shift=(0.25, 0.25), bend=0.0, strength=(0.6, 0.6)).degrade(point, seeded(2))
    assert ghost[:, :, 30:34, 30:34].min() < 1
    rest = ghost.clone()
    rest[:, :, 30:34, 30:34] = 0
    places = torch.nonzero(rest[0, 0] > 0.05).float().mean(0)
    assert (places - 31.5).norm().item() == pytest.approx(16, abs=1.5)


def test_fields_move_as_a_whole_and_paths_bounce():
    field = drifting_field(5, 32, 48, 1.5, (0.5, 0.25), seeded())
    assert field[0].mean().abs() < 1e-5
    assert field[0].std().item() == pytest.approx(1)
    assert torch.allclose(field[-1], field[0].roll((16, 12), (0, 1)), atol=1e-4)
    assert torch.allclose(field[2], field[0].roll((8, 6), (0, 1)), atol=1e-4)
    path = bouncing_path(101, 0.2, 0.8, 3.0, seeded())
    assert 0.2 <= path.min() < 0.21
    assert 0.79 < path.max() <= 0.8
    assert path.diff().abs().max() < 0.0301
    assert path.diff().abs().sum().item() == pytest.approx(3.0, abs=0.15)
    assert (bouncing_path(5, 0.3, 0.3, 1.0, seeded()) - 0.3).abs().max() < 1e-5


# --- combining and naming ---------------------------------------------------------------------------------------------


def test_chains_choices_and_chances(video):
    blur, noise = Blur(sigma=(1.0, 1.0), shapes=(1, 0, 0)), GaussianNoise(sigma=(0.1, 0.1))
    generator = seeded()
    wanted = noise.degrade(blur.degrade(video, generator), generator)
    assert torch.equal(Chain((blur, noise)).degrade(video, seeded()), wanted)
    assert torch.equal(Maybe(noise, 0.0).degrade(video, seeded()), video)
    assert not torch.equal(Maybe(noise, 1.0).degrade(video, seeded()), video)
    assert sum(torch.equal(Maybe(noise, 0.3).degrade(video, seeded(s)), video) for s in range(50)) in range(25, 46)
    sizes = [
        OneOf((Downscale((2, 2)), Downscale((4, 4))), (0.8, 0.2)).degrade(video, seeded(s)).shape[2] for s in range(50)
    ]
    assert set(sizes) == {24, 48}
    assert 30 <= sizes.count(48) <= 48


def test_configs_name_degradations():
    assert load_degradation({"name": "blur", "sigma": [1, 2]}) == Blur(sigma=(1.0, 2.0))
    assert load_degradation([{"name": "jpeg"}]) == Chain((Jpeg(),))
    nested = {
        "name": "second_order",
        "first": {"blur": {"sigma": [1, 2]}},
        "last": {"name": "jpeg", "quality": [10, 20]},
    }
    assert load_degradation(nested) == SecondOrder(first=Stage(blur=Blur(sigma=(1.0, 2.0))), last=Jpeg((10, 20)))
    assert load_mask({"name": "box", "area": [0.1, 0.2]}) == BoxMask(area=(0.1, 0.2))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("blur", "expected a degradation with a name"),
        ({"sigma": [1, 2]}, "expected a degradation with a name"),
        ({"name": "blurr"}, "no degradation is called 'blurr'; did you mean 'blur'"),
        ({"name": "box"}, "no degradation is called 'box'"),
        ({"name": "blur", "sigmas": [1, 2]}, "blur has no setting 'sigmas'; did you mean 'sigma'"),
        ({"name": "blur", "sigma": ["a", 2]}, "blur.sigma: .*number.* got"),
        ({"name": "blur", "sigma": [2, 1]}, "expected 0.01 to 50, the lower value first"),
        ({"name": "blur", "shapes": [0, 0, 0]}, "not all zero"),
        ({"name": "downscale", "factor": [0.5, 2]}, "expected 1 to 64"),
        ({"name": "downscale", "filter": "cubic"}, "downscale.filter: "),
        ({"name": "sinc", "size": 4}, "odd number"),
        ({"name": "jpeg", "quality": [0, 50]}, "expected 1 to 100"),
        ({"name": "jpeg", "quality": [10.5, 50]}, "jpeg.quality: "),
        ({"name": "video_codec", "codec": "mpeg4", "crf": [20, 40]}, "expected 1 to 31"),
        ({"name": "maybe"}, "maybe: part is missing"),
        ({"name": "maybe", "part": {"name": "jpeg"}, "probability": 2}, "expected 0 to 1"),
        ({"name": "one_of", "choices": [{"name": "jpeg"}], "weights": [1, 2]}, "a weight for each of 1"),
        ({"name": "second_order", "first": {"scale": [1, 100]}}, "expected 0.02 to 8"),
    ],
)
def test_wrong_settings_are_refused(spec, message):
    with pytest.raises(UsageError, match=message):
        load_degradation(spec)
    with pytest.raises(UsageError, match="no mask is called 'blur'"):
        load_mask({"name": "blur"})

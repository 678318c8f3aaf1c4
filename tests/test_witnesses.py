"""Witnesses on clips whose values are known by hand."""

import math

import pytest
import torch

from chopgrad_align.common.errors import UsageError
from chopgrad_align.evaluation.witnesses import BUILT_IN, Bounds, Witness, check_witnesses, load_witness
from chopgrad_align.evaluation.witnesses.reward import RewardWitness
from chopgrad_align.evaluation.witnesses.thumbnails import thumbnails


def value(name, clip):
    """The value of a built-in witness of one clip `(F, 3, H, W)`."""
    witness = BUILT_IN[name]()
    kept = witness.observe(clip.unsqueeze(0), [""], [0])
    return witness.values([*kept], [*kept], [0])[0]


def grey(*levels, size=16):
    """A clip of plain grey frames."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, size, size)


def square(step, frames=5, side=8, size=32):
    """A white square on black that moves right by `step` pixels a frame."""
    clip = torch.zeros(frames, 3, size, size)
    for frame in range(frames):
        clip[frame, :, 8 : 8 + side, 4 + step * frame : 4 + step * frame + side] = 1
    return clip


@pytest.fixture
def texture():
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_motion_of_a_square_is_what_it_covers_and_uncovers():
    assert value("motion", square(2)) == pytest.approx(2 * 2 * 8 / 32**2)  # two columns of eight pixels, twice
    assert value("motion", square(2).to(torch.bfloat16)) == pytest.approx(2 * 2 * 8 / 32**2)


@pytest.mark.parametrize(("down", "right"), [(0, 2), (3, 4), (-6, 0)], ids=["right", "diagonal", "up"])
def test_flow_of_a_texture_is_its_displacement(texture, down, right):
    clip = torch.stack([texture.roll((down * i, right * i), (1, 2)) for i in range(4)])
    assert value("flow", clip) == pytest.approx(math.hypot(down, right), rel=0.1)  # but where it leaves the frame
    large = clip.repeat_interleave(2, 2).repeat_interleave(2, 3)  # is averaged down to the same
    assert value("flow", large) == pytest.approx(2 * value("flow", clip), rel=1e-5)


def test_flow_counts_blocks_that_move_and_no_plain_ones():
    clip = square(2)
    # Blocks of 8 pixels; the square covers parts of two of the 16 in every frame, and the rest is plain.
    assert 0 < value("flow", clip) <= 2 * 3 / 16
    assert value("flow", 0.5 * clip) == pytest.approx(value("flow", clip))  # whatever the contrast
    assert value("motion", 0.5 * clip) == pytest.approx(0.5 * value("motion", clip))


def test_flicker_of_brightness_that_alternates():
    assert value("flicker", grey(0.4, 0.6, 0.4, 0.6, 0.4)) == pytest.approx(0.2)
    assert value("flicker", grey(0.1, 0.2, 0.3, 0.9)) == 0  # a fade, and a cut
    assert value("flicker", square(2)) == 0  # it stays for four frames wherever it comes
    assert value("flicker", square(8, frames=3)) > 0  # there and gone
    assert value("flicker", grey(0.4, 0.6, 0.5)) == pytest.approx(0.1)  # as far as it goes back


def test_saturation_is_the_spread_of_colours():
    clip = grey(0.5, 0.5).clone()
    assert value("saturation", clip) == 0
    clip[:, 0, :4] = 0.9  # a quarter is reddish
    assert value("saturation", clip) == pytest.approx(0.1)


def test_contrast_is_the_spread_of_brightness():
    clip = grey(0.5, 0.5).clone()
    assert value("contrast", clip) == pytest.approx(0, abs=1e-6)
    clip[:, :, :8], clip[:, :, 8:] = 0.2, 0.8
    assert value("contrast", clip) == pytest.approx(0.3)


def test_sharpness_is_that_of_edges():
    clip = torch.zeros(1, 3, 8, 8)
    clip[..., 4:] = 1  # the Laplacian is 1 and -1 beside the edge, 0 elsewhere
    assert value("sharpness", clip) == pytest.approx(0.5)
    assert value("sharpness", 0.5 * clip) == pytest.approx(0.25)
    assert value("sharpness", grey(0.3)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["motion", "flow", "flicker"])
def test_a_frozen_clip_does_not_move(texture, name):
    assert value(name, texture.expand(5, -1, -1, -1)) == 0


@pytest.mark.parametrize(("name", "frames"), [("motion", 1), ("flow", 1), ("flicker", 2)])
def test_too_few_frames_have_no_value(name, frames):
    assert math.isnan(value(name, torch.rand(frames, 3, 8, 8)))


def test_diversity_is_between_seeds_of_a_condition():
    witness = BUILT_IN["diversity"]()
    video = torch.stack([grey(level, level) for level in (0.0, 0.2, 1.0, 0.6, 0.6)])
    kept = [*witness.observe(video, [""] * 5, range(5))]
    values = witness.values(kept, [], [0, 0, 0, 1, 2])
    assert values[:3] == pytest.approx([(0.2 + 1) / 2, (0.2 + 0.8) / 2, (1 + 0.8) / 2])
    assert all(map(math.isnan, values[3:]))
    assert witness.values([kept[3], kept[4]], [], [7, 7]) == [0, 0]


def test_distance_is_to_the_base_models_video_of_the_pair():
    witness = BUILT_IN["distance"]()
    base, now = (torch.stack([grey(a, a), grey(b, b)]) for a, b in ((0.2, 0.4), (0.2, 1.0)))
    kept, before = ([*witness.observe(video, ["", ""], [0, 1])] for video in (now, base))
    assert witness.values(kept, before, [0, 1]) == pytest.approx([0, 0.6])


def test_thumbnails_are_small_and_keep_the_mean():
    video = torch.rand(2, 81, 3, 48, 80)
    small = thumbnails(video)
    assert small.shape == (2, 16, 3, 19, 32)
    assert small.dtype == torch.uint8
    plain = torch.full((1, 3, 3, 8, 8), 0.4)
    assert thumbnails(plain).tolist() == torch.full((1, 3, 3, 8, 8), 102).tolist()


def test_witnesses_take_the_samples_of_a_batch_alone():
    video = torch.rand(3, 4, 3, 16, 24)
    for name, kind in BUILT_IN.items():
        together = kind().observe(video, [""] * 3, range(3))
        alone = torch.cat([kind().observe(clip.unsqueeze(0), [""], [0]) for clip in video])
        torch.testing.assert_close(together, alone, msg=name)


OWN = """
import torch
from chopgrad_align import Bounds, Witness

class Redness(Witness):
    bounds = Bounds(0.5, 2.0)

    def __init__(self, scale=1.0):
        self.scale = scale

    def observe(self, video, prompts, seeds):
        return self.scale * video[:, :, 0].mean((1, 2, 3))

class Scalar(Redness):
    def observe(self, video, prompts, seeds):
        return video.mean()

def nothing():
    return 3
"""


def test_witnesses_of_ones_own_and_rewards(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    own = load_witness("red", f"{tmp_path}/own.py:Redness", {"scale": 2.0})
    assert isinstance(own, Witness)
    assert own.observe(torch.ones(1, 2, 3, 4, 4), [""], [0]).tolist() == [2]
    reward = load_witness("colour", "colorfulness", {"frames": 2})
    assert isinstance(reward, RewardWitness)
    assert reward.module is not None
    assert reward.observe(torch.rand(2, 3, 3, 8, 8), ["", ""], [0, 1]).shape == (2,)
    check_witnesses({"red": own, "colour": reward}, ["", ""], 5, (16, 16), torch.device("cpu"))
    with pytest.raises(UsageError, match=r"^witnesses.s: expected .* an entry for each of 2 videos, got \(\)"):
        check_witnesses(
            {"s": load_witness("s", f"{tmp_path}/own.py:Scalar", {})}, ["", ""], 5, (16, 16), torch.device("cpu")
        )
    with pytest.raises(UsageError, match=r"^witnesses.n: .* made a int, which is neither witness nor reward"):
        load_witness("n", f"{tmp_path}/own.py:nothing", {})
    with pytest.raises(UsageError, match="no reward is called 'colourfulness'; did you mean 'colorfulness'"):
        load_witness("x", "colourfulness", {})


@pytest.mark.parametrize(
    ("value", "bounds", "text"),
    [
        (0.8, Bounds(0.8, math.inf), "≥ 0.8"),
        (1.4, Bounds(0, 1.4), "≤ 1.4"),
        ([0.7, 1.4], Bounds(0.7, 1.4), "0.7 to 1.4"),
    ],
    ids=["least", "most", "both"],
)
def test_bounds(value, bounds, text):
    assert Bounds.of(value) == bounds
    assert str(bounds) == text
    assert 1 in bounds
    assert 0.6 not in bounds or bounds.least == 0
    assert 1.5 not in bounds or math.isinf(bounds.most)


@pytest.mark.parametrize(
    "value", [1, -0.5, [1.2, 1.4], [0.5, 0.7], [0.5]], ids=["one", "negative", "above", "below", "single"]
)
def test_bounds_hold_the_base_model(value):
    with pytest.raises(UsageError, match=r"^expected (bounds 0 ≤ least < 1 < most|one bound or two)"):
        Bounds.of(value)

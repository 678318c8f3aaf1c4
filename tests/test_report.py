import base64
import io
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from script_runs import run_script

from chopgrad_align.common.errors import UsageError
from chopgrad_align.data.procedural import texture_clip
from chopgrad_align.data.video import read_video, write_video
from chopgrad_align.evaluation.course import Line, Panel, Points, panels, read_metrics, smoothed
from chopgrad_align.evaluation.curves import draw_curves
from chopgrad_align.evaluation.figures import before_and_after, fixed, p_value
from chopgrad_align.evaluation.fused_video import fuse
from chopgrad_align.evaluation.heldout import _t_quantile, _t_test_p, paired, paired_where_finite
from chopgrad_align.evaluation.measurement import Measurement
from chopgrad_align.evaluation.report import write_report
from chopgrad_align.evaluation.samples import Sample, grouped, spread, typical
from chopgrad_align.evaluation.sheet import draw_samples
from chopgrad_align.evaluation.svg import panel_svg, sparkline_svg
from chopgrad_align.evaluation.watch import measurements
from chopgrad_align.evaluation.witnesses import Bounds
from chopgrad_align.objective.losses.psnr import PSNR
from chopgrad_align.objective.reading import Reading

PROMPTS = ["a red <star>", "a blue & white ring"]


def fill(run):
    """A small run folder with every part."""
    rows = [
        {
            "step": step,
            "reward": 0.2 + 0.01 * step if step != 3 else math.nan,
            "clip_score/score": 0.2,
            "loss": -0.2,
            "grad_norm": 0.5,
            "seconds/sampling": 2.0,
            "seconds/backward": 1.0,
            "peak_memory_gib": 1.5,
            "skipped": 0,
        }
        for step in range(1, 7)
    ]
    rows.insert(3, {"step": 3, "heldout/reward_mean": 0.2, "heldout/reward_stderr": 0.01, "heldout/clip_score": 0.2})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.yaml").write_text("model: <tiny>\n")
    scores = {"before": [0.1, 0.2, 0.3], "after": [0.2, 0.4, 0.25], "prompts": [*PROMPTS, "c"], "seeds": [7, 8, 9]}
    (run / "heldout.json").write_text(json.dumps(scores))
    (run / "environment.json").write_text('{"torch": "2.0"}')
    for index in range(2):
        for side in ("before", "after"):
            clip = texture_clip(index, frames=3, size=16).transpose(0, 1)
            write_video(run / "samples" / side / f"{index:03}.mp4", clip, fps=8)
    (run / "samples" / "prompts.json").write_text(json.dumps(PROMPTS))
    return run


# Critical values of Student's t as printed in statistical tables (two-sided).
@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [(12.7062, 1, 0.05), (63.6567, 1, 0.01), (2.2281, 10, 0.05), (4.5869, 10, 0.001), (1.9840, 100, 0.05)],
)
def test_p_values_are_those_of_the_tables(t, freedom, p):
    assert _t_test_p(t, freedom) == pytest.approx(p, rel=1e-3)
    assert _t_quantile(freedom, p) == pytest.approx(t, rel=1e-4)


def test_p_values_of_two_degrees_of_freedom_have_a_closed_form_far_into_the_tail():
    for t in (0.1, 3.0, 1e3, 1e6):
        # 1 - t / sqrt(2 + t^2), written so that it does not cancel
        root = math.sqrt(2 + t * t)
        assert _t_test_p(t, 2) == pytest.approx(2 / (root * (root + t)), rel=1e-9)


def test_paired_statistics():
    result = paired([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert (result.mean_before, result.mean_after, result.gain, result.count) == (2, 4, 2, 3)
    assert result.stderr_before == pytest.approx(1 / math.sqrt(3))
    assert result.gain_in_stds == pytest.approx(2)
    t = 2 * math.sqrt(3)  # differences 1, 2, 3
    assert result.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert result.margin == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)  # t of two degrees of freedom
    assert result.ratio == 2
    assert str(result) == "2 ± 0.58 before, 4 ± 1.2 after: +2 (+2.00 standard deviations, p = 0.07, n = 3)"


def test_paired_statistics_without_spread():
    same = paired([1.0, 1.0], [1.0, 1.0])
    assert (same.gain_in_stds, same.p_value) == (0, pytest.approx(1))
    shifted = paired([1.0, 1.0], [0.5, 0.5])
    assert (shifted.gain_in_stds, shifted.p_value) == (-math.inf, 0)


def test_the_test_counts_conditions_and_not_their_seeds():
    before = [1.0, 2.0, 3.0, 3.0, 2.0, 1.0, 5.0]
    after = [1.0, 3.0, 6.0, 5.0, 5.0, 4.0, 6.0]
    # Differences of a: 0, 2, 1; of b: 1, 3; of c: 3, 3. Their means are 1, 2, 3.
    result = paired(before, after, ["a", "b", "c", "a", "b", "c", "a"])
    assert (result.count, result.conditions) == (7, 3)
    assert result.gain == pytest.approx(2)
    assert result.mean_before == pytest.approx((3 + 2 + 2) / 3)
    assert result.mean_after - result.mean_before == pytest.approx(result.gain)
    assert result.stderr_before == pytest.approx(1 / 3)  # of 3, 2 and 2: standard deviation 1 / √3
    assert result.gain_in_stds == pytest.approx(2 / math.sqrt(41 / 21))  # variance of the seven scores before
    t = 2 * math.sqrt(3)
    assert result.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert str(result).endswith("p = 0.07, n = 3 conditions, 7 pairs)")


def test_a_condition_for_each_pair_and_one_for_all_are_tested_pair_by_pair():
    before, after = [1.0, 2.0, 3.5, 4.0], [2.0, 2.5, 4.0, 7.0]
    alone = paired(before, after)
    assert paired(before, after, [3, 1, 2, 0]) == alone
    one = paired(before, after, ["a circle"] * 4)
    assert one.p_value == alone.p_value
    assert str(one) == str(alone).replace("n = 4", "n = 4 seeds of one condition")


@pytest.mark.parametrize(("known", "least", "most"), [(True, 0.03, 0.07), (False, 0.08, 0.13)])
def test_false_positives_when_seeds_of_a_prompt_go_together(known, least, most):
    """Nothing changed, but half of the variance of a difference is the prompt's: p < 0.05 in one of twenty runs."""
    random = np.random.default_rng(0)
    prompts = [place % 32 for place in range(64)]
    false = 0
    for _ in range(2000):
        difference = random.normal(size=32)[prompts] + random.normal(size=64)
        false += paired([0.0] * 64, difference.tolist(), prompts if known else None).p_value < 0.05
    assert least < false / 2000 < most


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [([1.0], [2.0], "two pairs"), ([1.0, 2.0], [1.0], "2 before and 1 after"), ([1.0, math.nan], [1.0, 1.0], "finite")],
)
def test_paired_statistics_refuse(before, after, message):
    with pytest.raises(UsageError, match=message):
        paired(before, after)
    with pytest.raises(UsageError, match="the condition of each pair of scores, got 1 for 2"):
        paired([1.0, 2.0], [1.0, 2.0], ["a"])


def test_scores_that_are_not_finite_can_be_left_out():
    some = paired_where_finite([1.0, math.nan, 2.0, 3.0], [2.0, 1.0, 4.0, math.inf], [5, 6, 7, 8])
    assert some == paired([1.0, 2.0], [2.0, 4.0])
    assert paired_where_finite([1.0, math.nan], [1.0, 1.0], [0, 1]) is None
    with pytest.raises(UsageError, match="2 before and 1 after"):
        paired_where_finite([1.0, 2.0], [1.0], [0, 1])


def test_metrics_of_an_interrupted_and_resumed_run(tmp_path):
    lines = ['{"step": 1, "reward": 1.0}', '{"step": 2, "reward": 2.0}', '{"step": 2, "reward": 5.0, "new": 1}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "rew']))
    training, held_out = read_metrics(tmp_path)
    assert training["reward"].tolist() == [1, 5]
    np.testing.assert_array_equal(training["new"], [math.nan, 1])
    assert not held_out

    (tmp_path / "metrics.jsonl").write_text("oops\n")
    with pytest.raises(UsageError, match="line 1"):
        read_metrics(tmp_path)


def test_smoothing_keeps_a_constant_and_skips_nan():
    values = np.full(100, 3.0)
    values[[0, 10, 99]] = math.nan
    out = smoothed(values)
    assert math.isnan(out[0])
    np.testing.assert_allclose(out[1:], 3.0)


# --- curves -----------------------------------------------------------------------------------------------------------


def test_curves_are_drawn_over_and_over_without_pyplot(tmp_path):
    path = draw_curves(fill(tmp_path))
    assert path == tmp_path / "curves.png"
    draw_curves(tmp_path)
    with Image.open(path) as picture:
        assert min(picture.size) > 300
        assert len(set(picture.convert("RGB").resize((64, 64)).tobytes())) > 20
    assert not list(tmp_path.glob("*.partial"))


def test_curves_of_the_first_step_and_of_no_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "heldout/reward_mean": 0.2}\n')
    draw_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match="nothing to draw"):
        draw_curves(tmp_path)
    with pytest.raises(UsageError, match="cannot read"):
        draw_curves(tmp_path / "none")


def measurement(step, scores):
    return Measurement(step, scores, {"psnr": scores}, {}, ["a"] * 3, [0, 1, 2])


def test_no_panel_is_shown_twice_and_terms_are_read_as_people_do(tmp_path):
    training, held_out = read_metrics(fill(tmp_path))
    titles = [panel.title for panel in panels(training, held_out, [], {})]
    assert titles == ["clip_score", "gradient norm", "seconds a step", "peak memory, GiB"]

    measured = [measurement(0, [20.0, 24.0, 28.0]), measurement(5, [19.0, 22.0, 25.0])]
    rows = {"step": np.array([0.0, 5.0]), "heldout/psnr": np.array([24.0, 22.0])}
    (panel,) = panels({}, rows, measured, {"psnr": PSNR.reading.to_dict()})
    assert panel.title == "psnr, dB"
    assert panel.points.y.tolist() == [26, 28]
    change = paired([20.0, 24.0, 28.0], [19.0, 22.0, 25.0])
    np.testing.assert_allclose(panel.points.margin, [math.nan, change.margin])

    two = {"step": np.array([1.0]), "a/score": np.array([1.0]), "b/score": np.array([2.0]), "reward": np.array([3.0])}
    assert [panel.title for panel in panels(two, {}, [], {})] == ["a", "b", "objective"]


def test_a_plot_stays_within_its_frame_and_skips_what_is_not_finite():
    steps = np.arange(1000.0)
    values = np.sin(steps / 50) + 2
    values[400:500] = math.nan
    points = Points(np.array([0.0, 999.0]), np.array([2.0, math.nan]), np.array([math.nan, 1.0]))
    for panel in (
        Panel("a < b", [Line("", steps, values, values * 2)], points),
        Panel("log", [Line("", steps, values)], log=True),
        Panel("sum", [Line("x", steps, np.nan_to_num(values)), Line("y", steps, steps)], stacked=True),
        Panel("constant", [Line("", steps[:1], values[:1])]),
        Panel("nothing", [Line("", steps, np.full(1000, math.nan))]),
    ):
        svg = panel_svg(panel, chosen=500, last=1000)
        assert "nan" not in svg
        for path in re.findall(r' d="([^"]*)"', svg):
            xy = np.array(re.findall(r"[ML](-?[\d.]+),(-?[\d.]+)", path), dtype=float)
            assert len(xy) <= 302
            if len(xy):
                assert xy.min() >= 0
                assert (xy.max(0) <= (380, 190)).all()
    assert "a &lt; b" in panel_svg(Panel("a < b", [Line("", steps, values)]))


def test_a_sparkline_marks_what_is_out_of_bounds():
    svg = sparkline_svg([0, 5, 10, 15], [1.0, 1.5, math.nan, 1.2], Bounds(0.8, 1.4))
    assert svg.count('class="breach"') == 1
    assert svg.count('class="end"') == 1
    assert "nan" not in svg


# --- samples ----------------------------------------------------------------------------------------------------------


def samples(*gains):
    return [Sample(place, gain, {}, {}) for place, gain in enumerate(gains)]


def gains_of(group):
    return [sample.gain for sample in group]


def test_the_largest_the_median_and_the_smallest_gains_are_shown_first():
    gains = [0.5, -2, 3, 1, 9, 8, math.nan, 2, 4, 5, 0]
    groups = grouped(samples(*gains))
    assert [(heading, gains_of(group)) for heading, group in groups[:3]] == [
        ("Largest gains", [9, 8]),
        ("Around the median", [3, 2]),
        ("Largest losses", [0, -2]),
    ]
    assert groups[3][0] == "Others"
    np.testing.assert_array_equal(gains_of(groups[3][1]), [5, 4, 1, 0.5, math.nan])
    assert gains_of(typical(samples(*gains))) == [9, 2, -2]
    assert grouped(samples(*range(9)))[2][0] == "Smallest gains"
    few = samples(1, 3, math.nan, 2)
    assert [heading for heading, _ in grouped(few)] == [""]
    assert gains_of(grouped(few)[0][1])[:3] == [3, 2, 1]
    assert gains_of(typical(samples(1, 3))) == [3, 1]
    assert gains_of(typical(samples(1))) == [1]
    assert grouped([]) == typical([]) == []


def test_steps_are_spread_evenly_and_the_exported_one_is_among_them():
    assert spread([0, 10, 20], 8, None) == [0, 10, 20]
    steps = list(range(0, 101, 5))
    for kept in (None, 0, 35, 95, 100, 7):
        chosen = spread(steps, 5, kept)
        assert len(chosen) == 5
        assert (chosen[0], chosen[-1]) == (0, 100)
        assert kept in chosen or kept in (None, 7)


def counting(frames, height=32, width=48):
    """A video whose frames are greys that tell their number."""
    return (torch.arange(frames) * 8 + 16).div(255).view(-1, 1, 1, 1).expand(-1, 3, height, width)


def test_fused_videos_are_the_videos_frame_by_frame(tmp_path):
    video = texture_clip(3, frames=5, size=64).transpose(0, 1)
    one = write_video(tmp_path / "one.mp4", video, fps=8)
    other = write_video(tmp_path / "other.mp4", 1 - video, fps=8)
    fused = fuse([one, other], 416, 10**6)
    assert fused.size == (192 + 4 + 192, 192)
    assert fused.enlarged
    assert Image.open(io.BytesIO(fused.poster)).size == fused.size
    (tmp_path / "fused.mp4").write_bytes(fused.mp4)
    seen, fps = read_video(tmp_path / "fused.mp4")
    assert (seen.shape, fps) == ((5, 3, 192, 388), 8)
    for left, path in ((1, one), (197, other)):
        assert (seen[:, :, 1::3, left : left + 191 : 3] - read_video(path)[0]).abs().mean() < 0.02


def test_fused_videos_are_small_however_hard_they_are(tmp_path):
    path = write_video(tmp_path / "noise.mp4", torch.rand(16, 3, 96, 160), fps=16)
    fused = fuse([path, path], 80, 20_000)
    assert fused.size == (164, 48)
    assert not fused.enlarged
    assert len(fused.mp4) <= 20_000
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UsageError, match="not a"):
        fuse([path, tmp_path / "cut.mp4"], 80, 20_000)


def test_the_sheet_has_the_same_pairs_as_the_page_first(tmp_path):
    run = fill(tmp_path)
    first = draw_samples(run).read_bytes()
    scores = json.loads((run / "heldout.json").read_text())
    scores["after"] = [0.9, 0.1, 0.3]  # now the first pair gained more
    (run / "heldout.json").write_text(json.dumps(scores))
    assert draw_samples(run).read_bytes() != first
    shutil.rmtree(run / "samples")
    assert draw_samples(run) is None


# --- the page ---------------------------------------------------------------------------------------------------------


def test_numbers_have_as_many_digits_as_are_known():
    change = paired([20.0, 21.0, 25.0, 22.0], [21.0, 22.5, 25.5, 23.0])
    assert before_and_after(change) == ("22.00", "23.00", "+1.00", "+0.35 to +1.65")
    assert before_and_after(paired([0.5, 0.25], [0.5, 0.25])) == ("0.3750", "0.3750", "+0.0000", "+0.0000 to +0.0000")
    assert [fixed(-1.25, 2), fixed(-0.001, 1), fixed(math.nan, 2)] == ["−1.25", "0.0", "–"]
    assert [p_value(p) for p in (0.5, 0.0123, 1e-7)] == ["0.50", "0.01", "1e-07"]


def test_a_loss_of_decibels_is_read_as_psnr():
    target, noise = torch.rand(1, 2, 3, 16, 16), 0.1 * torch.randn(1, 2, 3, 16, 16)
    mean = noise.square().mean((2, 3, 4))
    expected = (-10 * mean.log10()).mean()
    assert PSNR.reading(PSNR()(target + noise, target).item()) == pytest.approx(expected.item(), abs=0.01)
    assert Reading.of({"a": PSNR.reading.to_dict()}, "a") == PSNR.reading


def test_the_page_has_everything_and_needs_nothing(tmp_path):
    run = fill(tmp_path)
    html = write_report(run).read_text(encoding="utf-8")
    assert html.count("<video") == 2
    sources = re.findall(r'(?:src|poster)="(.{22})', html)
    assert len(sources) == 4
    assert all(source.startswith("data:") for source in sources)
    assert "http" not in html
    assert "a red &lt;star&gt;" in html
    assert "<star>" not in html
    assert "model: &lt;tiny&gt;" in html
    assert "2 of 3 pairs rose (n = 3)" in html
    assert "2 of 3 held-out pairs were recorded" in html
    assert "1.50 GiB" in html
    assert html.count('<svg class="plot"') == 4
    # The larger gain comes first.
    assert html.index("a blue &amp; white ring</p>") < html.index("a red &lt;star&gt;</p>")
    first = re.search(r'<video[^>]*src="data:video/mp4;base64,([^"]*)"', html)
    assert first
    (tmp_path / "first.mp4").write_bytes(base64.b64decode(first[1]))
    assert read_video(tmp_path / "first.mp4")[0].shape == (3, 3, 192, 388)


def test_the_page_tests_conditions(tmp_path):
    scores = {"before": [0.1, 0.2, 0.3, 0.1], "after": [0.2, 0.4, 0.25, 0.3], "conditions": [0, 1, 0, 1]}
    (tmp_path / "heldout.json").write_text(json.dumps(scores))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    p = paired(scores["before"], scores["after"], scores["conditions"]).p_value
    assert f"not significant, p = {p_value(p)}; 3 of 4 pairs rose (n = 2 conditions, 4 pairs)" in html


def test_each_term_has_its_own_unit_direction_and_significance(tmp_path):
    scores = {
        "before": [1.0, 2.0, 3.0, 4.0],
        "after": [2.0, 3.0, 4.5, 5.0],
        "terms": {
            "psnr": {"before": [24.0, 25.0, 26.0, 27.0], "after": [22.0, 23.1, 24.0, 25.2]},
            "l1": {"before": [0.1, 0.2, 0.3, 0.4], "after": [0.2, 0.31, 0.42, 0.5]},
            "clip": {"before": [0.1, 0.2, 0.3, 0.4], "after": [0.2, 0.1, 0.31, 0.4]},
        },
        "readings": {"psnr": PSNR.reading.to_dict(), "l1": Reading("lower").to_dict()},
    }
    (tmp_path / "heldout.json").write_text(json.dumps(scores))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    blocks = re.findall(r'<div class="(\w+)">\n<p class="label">(\w+)(?:<span>(.*?)</span>)?', html)
    assert blocks == [
        ("better", "psnr", "higher is better"),
        ("worse", "l1", "lower is better"),
        ("same", "clip", "higher is better"),
        ("better", "objective", "higher is better"),
    ]
    assert re.search(r"24\.50</span>.*26\.4\d</span> <small>dB</small>", html)
    assert "reward" not in re.sub(r"<style>.*?</style>", "", html, flags=re.S)


def test_the_page_shows_witnesses_and_what_the_guard_remarked(tmp_path):
    fill(tmp_path)
    scores = json.loads((tmp_path / "heldout.json").read_text()) | {
        "witnesses": {"motion": {"before": [1, 2, 3], "after": [0.5, 1.5, None]}},
        "terms": {"clip_score": {"before": [1, 2, 3], "after": [2, 3, 4]}},
        "bounds": {"motion": [0.8, None]},
        "remarks": ["motion fell to 0.67 of the base model's (bound 0.8) at step 6"],
    }
    (tmp_path / "heldout.json").write_text(json.dumps(scores))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<li>motion fell to 0.67 of the base model&#39;s (bound 0.8) at step 6</li>" in html
    assert "<li class=bad>out of bounds: motion</li>" in html
    assert '0.67 ✗</td><td class="soft">≥ 0.8</td>' in html
    assert "<span>motion ×0.50</span>" in html
    assert "in the objective" in html


def interrupted(run):
    """What a run leaves that was killed after its third measurement, of two recorded pairs."""
    for step in (0, 10, 20):
        scores = [1.0 + step / 10, 2.0, 3.0 - step / 20]
        saved = Measurement(
            step, scores, {"clip": scores}, {"motion": [1.0 + step / 20] * 3}, [*PROMPTS, "c"], [0, 1, 2]
        )
        (run / "heldout").mkdir(exist_ok=True)
        (run / "heldout" / f"step-{step:06d}.json").write_text(saved.to_json())
        for place in range(2):
            name = f"step-{step:06d}" if step else "before"
            write_video(run / "samples" / name / f"{place:03}.mp4", counting(24), fps=8)
    rows = [{"step": step, "reward": 0.1, "clip/score": 0.1, "seconds/step": 1.0} for step in range(1, 24)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "samples" / "prompts.json").write_text(json.dumps(PROMPTS))
    (run / "config.yaml").write_text("train: {steps: 90}\n")
    return run


def test_a_run_that_was_killed_has_a_page_of_what_it_measured(tmp_path, monkeypatch, capsys):
    run = interrupted(tmp_path)
    status, out, _ = run_script("report.py", monkeypatch, capsys, run)
    assert (status, out) == (0, f"look at {run}/report.html\n")
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "step 23 of 90; held-out pairs were last measured at step 20<" in html
    assert html.count("<video") == 4  # two pairs, and both through training
    assert re.findall(r"<span[^>]*>(\w+ ?\d*)<br>([\d.]+)</span>", html)[:3] == [
        ("Base", "1.000"),
        ("Step 10", "2.000"),
        ("Step 20", "3.000"),
    ]
    assert html.count('<svg class="sparkline"') == 2
    for path in (run / "heldout").glob("step-0000[12]0.json"):
        path.unlink()
    assert "not measured after training yet" in write_report(run).read_text(encoding="utf-8")


def test_a_run_is_watched_measurement_by_measurement(tmp_path):
    looks = measurements(tmp_path, seconds=0)
    next(looks)
    interrupted(tmp_path)
    next(looks)
    (tmp_path / "heldout.json").write_text("{}")
    next(looks)
    os.utime(tmp_path / "heldout.json", (1, 1))
    next(looks)


def test_the_page_leaves_out_what_is_missing(tmp_path):
    assert "<h2>" not in write_report(tmp_path).read_text(encoding="utf-8")
    write_video(tmp_path / "samples/after/000.mp4", torch.zeros(2, 3, 16, 16), fps=8)
    (tmp_path / "metrics.jsonl").write_text("")
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert html.count("<video") == 1
    assert html.count("<h2>") == 1


def test_the_page_names_what_is_broken(tmp_path):
    with pytest.raises(UsageError, match="no run folder"):
        write_report(tmp_path / "none")
    (tmp_path / "heldout.json").write_text("{")
    with pytest.raises(UsageError, match=r"heldout\.json is not JSON"):
        write_report(tmp_path)
    (tmp_path / "heldout.json").write_text("[1]")
    with pytest.raises(UsageError, match="expected a JSON dict"):
        write_report(tmp_path)
    (tmp_path / "heldout.json").unlink()
    (tmp_path / "heldout").mkdir()
    (tmp_path / "heldout/step-000000.json").write_text("{}")
    with pytest.raises(UsageError, match="not a measurement"):
        write_report(tmp_path)
    shutil.rmtree(tmp_path / "heldout")
    (tmp_path / "samples/after").mkdir(parents=True)
    (tmp_path / "samples/after/000.mp4").write_text("cut")
    with pytest.raises(UsageError, match="not a video"):
        write_report(tmp_path)


# --- the page in a browser --------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Greys of the left and the right half of the first video, from one picture of it.
HALVES = """() => {
  const video = document.querySelector("video"), canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(video, 0, 0);
  return [0.25, 0.75].map((part) => context.getImageData(part * canvas.width, canvas.height / 2, 1, 1).data[0]);
}"""


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as session:
        quiet = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
        browser = session.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_in_chromium(chromium, tmp_path, width, scheme, motion):
    path = write_report(interrupted(tmp_path))
    view = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme, "reduced_motion": motion}
    context = chromium.new_context(**view)
    page, faults, requests = context.new_page(), [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) > 380) == (scheme == "light")

    # Videos play while they are seen; without motion, when they are asked to.
    playing = "[...document.querySelectorAll('video')].map((video) => !video.paused)"
    page.locator("video").first.scroll_into_view_if_needed()
    button = page.locator("button[data-holds]")
    if motion == "reduce":
        page.wait_for_timeout(300)
        assert not any(page.evaluate(playing))
        assert button.inner_text() == "Play all"
        button.click()
    page.wait_for_function("document.querySelector('video').currentTime > 0.3")
    seen = []
    for _ in range(6):
        left, right = page.evaluate(HALVES)
        assert abs(left - right) <= 2  # a frame later would be 8
        seen.append(left)
        page.wait_for_timeout(150)
    assert len(set(seen)) > 2
    button.click()
    page.wait_for_timeout(100)
    assert not any(page.evaluate(playing))
    assert button.inner_text() == "Play all"
    button.click()

    # What is out of sight waits; a single one can be held, by its own controls and from the keyboard.
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    page.wait_for_function(f"!({playing})[0]")
    page.locator("video").first.scroll_into_view_if_needed()
    page.wait_for_function(f"({playing})[0]")
    page.locator("video").first.hover()
    assert page.evaluate("document.querySelector('video').controls")
    page.locator("video").first.focus()
    page.keyboard.press("Space")
    page.wait_for_function(f"!({playing})[0]")

    picture = page.screenshot(path=tmp_path / "page.png", full_page=True)
    with Image.open(tmp_path / "page.png") as image:
        assert (image.width, len(picture) > 20_000) == (width, True)
    assert not faults
    assert not [url for url in requests if not url.startswith(("file:", "data:"))]
    context.close()

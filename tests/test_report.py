import base64
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from chopgrad_align.common.errors import UsageError
from chopgrad_align.data.procedural import texture_clip
from chopgrad_align.data.video import write_video
from chopgrad_align.evaluation.curves import draw_curves, read_metrics, smoothed
from chopgrad_align.evaluation.heldout import _t_quantile, _t_test_p, paired, paired_where_finite
from chopgrad_align.evaluation.report import write_report

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


def test_the_report_has_everything_and_needs_nothing(tmp_path):
    run = fill(tmp_path)
    draw_curves(run)
    html = write_report(run).read_text(encoding="utf-8")
    assert html.count("<video") == 4
    sources = re.findall(r'src="(.{22})', html)
    assert len(sources) == 5
    assert all(source.startswith("data:") for source in sources)
    assert "http" not in html
    assert "<script" not in html
    assert "a red &lt;star&gt;" in html
    assert "<star>" not in html
    assert "model: &lt;tiny&gt;" in html
    assert "n&nbsp;=&nbsp;3);\n2 of 3 pairs rose" in html
    assert "1.50 GiB" in html
    first = re.search(r'<video[^>]*src="data:video/mp4;base64,([^"]*)"', html)
    assert first
    assert base64.b64decode(first[1]) == (run / "samples/before/000.mp4").read_bytes()


def test_the_report_tests_conditions(tmp_path):
    scores = {"before": [0.1, 0.2, 0.3, 0.1], "after": [0.2, 0.4, 0.25, 0.3], "conditions": [0, 1, 0, 1]}
    (tmp_path / "heldout.json").write_text(json.dumps(scores))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "the same 4 pairs" in html
    p = paired(scores["before"], scores["after"], scores["conditions"]).p_value
    assert f"p&nbsp;=&nbsp;{p:.1g} (paired t-test, n&nbsp;=&nbsp;2 conditions, 4 pairs)" in html


def test_the_report_shows_witnesses_and_what_the_guard_remarked(tmp_path):
    fill(tmp_path)
    scores = json.loads((tmp_path / "heldout.json").read_text()) | {
        "witnesses": {"motion": {"before": [1, 2, 3], "after": [0.5, 1.5, None]}},
        "terms": {"clip_score": {"before": [1, 2, 3], "after": [2, 3, 4]}},
        "bounds": {"motion": [0.8, None]},
        "remarks": ["motion fell to 0.67 of the base model's (bound 0.8) at step 6"],
    }
    (tmp_path / "heldout.json").write_text(json.dumps(scores))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for step, motion in ((0, 1.5), (6, 1.0)):
            file.write(
                json.dumps({"step": step, "heldout/witness/motion": motion, "heldout/witness/distance": 0}) + "\n"
            )
    draw_curves(tmp_path)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<li>motion fell to 0.67 of the base model&#39;s (bound 0.8) at step 6</li>" in html
    assert '0.67 ✗</td><td class="number">-0.5 [-0.5, -0.5]</td><td class="soft">≥ 0.8</td>' in html
    assert "part of the objective" in html


def test_the_report_leaves_out_what_is_missing(tmp_path):
    assert "<h2>" not in write_report(tmp_path).read_text(encoding="utf-8")
    write_video(tmp_path / "samples/after/000.mp4", torch.zeros(2, 3, 16, 16), fps=8)
    (tmp_path / "metrics.jsonl").write_text("")
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert html.count("<video") == 1
    assert html.count("<h2>") == 1


def test_the_report_names_what_is_broken(tmp_path):
    with pytest.raises(UsageError, match="no run folder"):
        write_report(tmp_path / "none")
    (tmp_path / "heldout.json").write_text("{")
    with pytest.raises(UsageError, match=r"heldout\.json is not JSON"):
        write_report(tmp_path)
    (tmp_path / "heldout.json").write_text("[1]")
    with pytest.raises(UsageError, match="expected a JSON dict"):
        write_report(tmp_path)
    (tmp_path / "heldout.json").unlink()
    (tmp_path / "samples/after").mkdir(parents=True)
    (tmp_path / "samples/after/000.mp4").write_text("cut")
    with pytest.raises(UsageError, match="not a video"):
        write_report(tmp_path)

"""What a guard says of measurements, and which model is exported for it."""

import math

import pytest

from chopgrad_align.common.errors import UsageError
from chopgrad_align.evaluation.changes import changes, table
from chopgrad_align.evaluation.measurement import Measurement, comparison
from chopgrad_align.evaluation.witnesses import Bounds
from chopgrad_align.training.guard import BoundsAndPatience, Guard, Verdict, best, exported, remarks, score
from chopgrad_align.training.history import History


def measured(step, objective, motion=1.0, **witnesses):
    """Three pairs around an objective and a motion."""
    three = {name: [0.9 * mean, mean, 1.1 * mean] for name, mean in {"motion": motion, **witnesses}.items()}
    terms = {"clip": [objective - 1, objective, objective + 1]}
    return Measurement(step, terms["clip"], terms, three, ["a", "b", "c"], [0, 1, 2])


BASE = measured(0, 5.0)
BOTH = BoundsAndPatience({"motion": Bounds(0.8, 1.5)})


def judged(guard, run):
    return [guard.judge(run[0], run[1:i], run[i]) for i in range(1, len(run))]


@pytest.mark.parametrize(
    ("motion", "sentence"),
    [
        (0.81, None),
        (1.49, None),
        (0.71, "motion fell to 0.71 of the base model's (bound 0.8) at step 60"),
        (1.6, "motion rose to 1.6 of the base model's (bound 1.5) at step 60"),
        (math.nan, "motion of some video is not finite at step 60"),
    ],
    ids=["low", "high", "fell", "rose", "nan"],
)
def test_bounds_are_relative_to_the_base_model(motion, sentence):
    verdict = BOTH.judge(BASE, [], measured(60, 6.0, motion))
    assert verdict == Verdict(within=sentence is None, sentences={} if sentence is None else {"motion": sentence})


def test_what_the_base_model_does_not_have_is_not_judged():
    guard = BoundsAndPatience({"motion": Bounds(0.8), "diversity": Bounds(0.8), "score": Bounds(0.8)}, on_breach="stop")
    base, now = measured(0, 5.0, 0.0, score=-3.0), measured(9, 6.0, 1.0, score=-9.0)
    for measurement in (base, now):
        measurement.witnesses["diversity"] = [0.2, 0.2, math.nan]  # of a prompt with one seed
    assert guard.judge(base, [], now) == Verdict()


@pytest.mark.parametrize(
    ("on_breach", "stop", "back"), [("warn", False, False), ("stop", True, False), ("back", True, True)]
)
def test_what_follows_a_breach(on_breach, stop, back):
    guard = BoundsAndPatience({"motion": Bounds(0.8)}, on_breach=on_breach)
    assert guard.judge(BASE, [], measured(1, 6.0)) == Verdict()
    verdict = guard.judge(BASE, [], measured(1, 6.0, 0.5))
    assert (verdict.within, verdict.stop, verdict.back) == (False, stop, back)


def test_patience_counts_measurements_since_the_best():
    guard = BoundsAndPatience(patience=2, on_breach="stop")
    run = [BASE, *(measured(10 * i, mean) for i, mean in enumerate((5.5, 5.4, 6.0, 6.0, 5.9), 1))]
    verdicts = judged(guard, run)
    assert [verdict.stop for verdict in verdicts] == [False, False, False, False, True]
    assert all(verdict.within for verdict in verdicts)
    assert verdicts[-1].sentences == {
        "patience": "the held-out objective at step 50 is no better than at step 30, 2 measurements before (patience 2)"
    }
    # The base model is the best of a run that only falls.
    assert [v.stop for v in judged(guard, [BASE, measured(10, 4.0), measured(20, 4.5)])] == [False, True]


def test_the_best_is_within_the_bounds_and_the_first_of_equals():
    run = [BASE, measured(10, 6.0), measured(20, 7.0), measured(30, 7.0), measured(40, 9.0, 0.5)]
    verdicts = judged(BOTH, run)
    assert best(run, verdicts) is run[2]
    after, remark = exported(run, verdicts, "best")
    assert after is run[2]
    assert remark.startswith(
        "lora/ holds step 20, the best within the bounds of 4 measured steps, and not the last, 40"
    )
    assert exported(run, verdicts, "last") == (run[4], "")
    back = judged(BoundsAndPatience(BOTH.bounds, on_breach="back"), run)
    assert exported(run, back, "last")[0] is run[2]


def test_nothing_within_the_bounds_leaves_the_last():
    run = [BASE, measured(10, 6.0, 0.5), measured(20, 7.0, 0.4)]
    after, remark = exported(run, judged(BOTH, run), "best")
    assert after is run[2]
    assert remark == "no measured step is within the bounds and finite: lora/ holds the last, step 20"


def test_a_score_that_is_not_finite_is_never_the_best():
    bad = measured(20, 9.0)
    bad.objective[1] = math.nan
    run = [BASE, measured(10, 6.0), bad]
    assert score(BASE, bad) == -math.inf
    assert best(run, judged(BOTH, run)) is run[1]
    assert score(bad, measured(30, 8.0)) == 8.0  # of the pairs that the base model has a score for
    assert bad.row()["heldout/reward_mean"] == 9.0


class Nervous(Guard):
    """A guard of somebody else."""

    def judge(self, baseline, past, now):
        return Verdict(stop=len(past) > 0, sentences={"all": f"step {now.step} is enough"} if past else {})


def test_a_guard_of_ones_own():
    assert [v.stop for v in judged(Nervous(), [BASE, measured(1, 5), measured(2, 5)])] == [False, True]


def test_a_run_is_told_by_what_broke_first_and_by_its_end():
    run = [BASE, *(measured(10 * i, 5.0, motion) for i, motion in enumerate((1.0, 0.7, 1.6, 0.6, 0.5), 1))]
    assert remarks(judged(BOTH, run)) == [
        "motion fell to 0.7 of the base model's (bound 0.8) at step 20",
        "motion fell to 0.5 of the base model's (bound 0.8) at step 50",
    ]
    assert remarks(judged(BOTH, run[:3])) == ["motion fell to 0.7 of the base model's (bound 0.8) at step 20"]
    assert remarks([]) == []


# --- the history of a run ---------------------------------------------------------------------------------------------


def test_a_history_is_read_back_up_to_a_step(tmp_path):
    history = History(tmp_path)
    for step in (0, 20, 1_000_000):
        history.add(measured(step, 5.0, math.nan if step == 20 else 1.0), write=True)
    again = History(tmp_path)
    again.load(20)
    assert [m.step for m in again.measured] == [0, 20]
    assert again.baseline == BASE
    assert all(map(math.isnan, again.measured[1].witnesses["motion"]))
    again.rewind(20)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000000.json", "step-000020.json"}
    (tmp_path / "step-000000.json").unlink()
    with pytest.raises(UsageError, match=r"--resume: .*step-000000.json is not there, the measurement of the model"):
        History(tmp_path).load(20)


# --- what is shown of it ----------------------------------------------------------------------------------------------


def test_the_table_of_changes():
    run = [BASE, measured(10, 6.0, 1.2), measured(20, 7.0, 0.5)]
    held_out = comparison(run, run[1]) | {"bounds": {"motion": [0.8, None]}}
    assert held_out["after"] == [5.0, 6.0, 7.0]
    assert held_out["steps"] == {"before": 0, "after": 10, "last": 20}
    clip, motion = changes(held_out)
    assert (clip.name, clip.trained, clip.bounds) == ("clip", True, None)
    assert clip.after.gain == pytest.approx(1)
    assert clip.after.margin == pytest.approx(0, abs=1e-9)  # every pair rose by one
    assert motion.after.ratio == pytest.approx(1.2)
    # Differences 0.18, 0.2, 0.22: t of two degrees of freedom at 95 % is 4.3027.
    assert motion.after.margin == pytest.approx(4.3027 * 0.02 / math.sqrt(3), rel=1e-4)
    assert not motion.breached(motion.after)
    assert motion.breached(motion.last)
    assert table([clip, motion]) == [
        "        before  after  ratio  difference ± 95 %  last step  bound",
        "clip         5      6   1.20             +1 ± 0       1.40  in the objective",
        "motion       1    1.2   1.20        +0.2 ± 0.05      0.50!  ≥ 0.8",
    ]

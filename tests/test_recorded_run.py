"""The trainer computes what an earlier version of it did, whose numbers were recorded.

Two machines with other kernels differ in rounding, which AdamW's first steps amplify where a gradient is nearly zero;
on the machine on which they were recorded all numbers are equal.
"""

import json

import pytest
import recorded_run

from chopgrad_align import load_config, train


@pytest.mark.slow
def test_a_run_is_the_recorded_one(tmp_path):
    train(load_config(recorded_run.CONFIG, [f"run.folder={tmp_path}/run"]))
    recorded, found = json.loads(recorded_run.RECORD.read_text()), recorded_run.numbers(tmp_path / "run")
    assert found["before"] == pytest.approx(recorded["before"], rel=1e-4)
    assert found["after"] == pytest.approx(recorded["after"], rel=1e-3)
    assert found["norms"] == pytest.approx(recorded["norms"], rel=1e-3)
    for row, expected in zip(found["rows"], recorded["rows"], strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-3)

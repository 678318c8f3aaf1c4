"""What the model is told beside what the rewards are told, and the noise that its videos start from."""

import pytest
import tiny_pipelines
import tiny_runs
import torch
from tiny_runs import rows, saved_lora

from chopgrad_align import UsageError
from chopgrad_align.data.prompts import Condition, read_conditions
from chopgrad_align.objective.objective import Objective
from chopgrad_align.training.batches import PromptBatches
from chopgrad_align.training.bound_conditions import bind
from chopgrad_align.training.captions import Captions
from chopgrad_align.training.run import train

TRAINING = [Condition(f"training {i}", negative_prompt="grey" if i == 0 else None) for i in range(6)]
HELD_OUT = [Condition("held out")]


class TakesNoNegative:
    def __call__(self, prompt):
        """As some pipelines."""


def batches(training=TRAINING, **options):
    pipe = tiny_pipelines.wan_t2v()
    rows = [bind(pipe, conditions).rows for conditions in (training, HELD_OUT)]
    return PromptBatches(pipe, Objective(), *rows, 3, 7, **options)


def test_prompts_are_told_with_a_trigger_or_left_out():
    made = batches(captions=Captions("sks style,", 0.4), call={"negative_prompt": "ugly"})
    told = {}
    for step in range(20):
        batch = made.micro_batch(step, range(3))
        told.update({(step, i): batch.inputs["prompt"][i] for i in range(3)})
        for i, prompt in enumerate(batch.prompts):
            assert prompt in {condition.prompt for condition in TRAINING}
            assert told[step, i] in ("", f"sks style, {prompt}")
            assert batch.inputs["negative_prompt"][i] == ("grey" if prompt == "training 0" else "ugly")
            # A function of step and place, however large micro-batches are.
            assert made.micro_batch(step, range(i, i + 1)).inputs["prompt"] == told[step, i]
            text = {"prompt": told[step, i], "negative_prompt": batch.inputs["negative_prompt"][i]}
            assert text in made.texts(step + 1)
    assert 12 < sum(text == "" for text in told.values()) < 36  # 24 ± 3 standard deviations
    assert made.held_out(range(1)).inputs["prompt"] == "sks style, held out"
    assert made.prompts(20) == ["held out", *dict.fromkeys(p for p in made.prompts(20) if p != "held out")]


def test_without_negative_prompts_the_call_keeps_its_own():
    made = batches([Condition("a"), Condition("b")], call={"negative_prompt": "ugly"})
    assert "negative_prompt" not in made.micro_batch(0, range(2)).inputs
    assert made.texts(1) == [{"prompt": "held out"}, *({"prompt": prompt} for prompt in made.prompts(1)[1:])]
    with pytest.raises(UsageError, match="TakesNoNegative takes no negative prompts"):
        bind(TakesNoNegative(), TRAINING)


@pytest.mark.parametrize("fixed", [False, True], ids=["fresh", "fixed"])
def test_noise(fixed):
    made, seeds = batches(fixed_noise=fixed), {}
    for step in range(8):
        batch = made.micro_batch(step, range(3))
        for prompt, seed, generator in zip(batch.prompts, batch.seeds, batch.inputs["generator"], strict=True):
            assert generator.initial_seed() == seed
            seeds.setdefault(prompt, set()).add(seed)
    assert all(len(found) == (1 if fixed else 4) for found in seeds.values())
    assert len(set.union(*seeds.values())) == (6 if fixed else 24)


def test_negative_prompts_of_a_file(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,negative_prompt\na fox,grey\na cat,\n")
    assert read_conditions(tmp_path / "p.csv") == [Condition("a fox", negative_prompt="grey"), Condition("a cat")]


def test_a_run_is_the_same_with_prompts_encoded_once(tmp_path):
    tiny_pipelines.wan_t2v().save_pretrained(tmp_path / "wan")
    found = []
    for once in (True, False):
        config = tiny_runs.config(
            tmp_path,
            tmp_path / "wan",
            *(f"run.folder={tmp_path}/{once}", f"model.encode_prompts_once={once}", f"data.train={tmp_path}/own.csv"),
            *("data.trigger='a red'", "data.caption_dropout=0.5", "train.seeds=fixed", "train.micro_batch=2"),
        )
        (tmp_path / "own.csv").write_text("prompt,negative_prompt\ncircle,blue\nstar,\nlarge star,spinning\n")
        train(config)
        found.append((rows(tmp_path / str(once)), saved_lora(tmp_path / str(once))))
    (ours, weights), (theirs, expected) = found
    assert [row["reward"] for row in ours] == pytest.approx([row["reward"] for row in theirs], rel=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-2, atol=1e-4)

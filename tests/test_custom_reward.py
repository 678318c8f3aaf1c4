"""The tutorial on rewards of one's own, followed from its first line to its last: files, commands, what they say."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from tiny_runs import rows

from chopgrad_align.__main__ import main
from chopgrad_align.objective.reward import load_reward
from chopgrad_align.training.config_file import load_config

ROOT = Path(__file__).parents[1]
TUTORIAL = (ROOT / "docs" / "custom_reward.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL)
TINY = [
    *("train.steps=2", "train.batch_size=2", "train.micro_batch=2", "validation.pairs=2", "validation.videos=2"),
    *("model.call.num_frames=5", "model.call.num_inference_steps=2", "gradient.steps.args.count=2"),
]


def follow(command, extra=()):
    """Run a command of the tutorial in this process; its exit status."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    assert words[0] == "chopgrad-align"
    try:
        main([*words[1:], *extra])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize(
    "extra", [pytest.param(TINY, id="tiny"), pytest.param([], id="as it stands", marks=pytest.mark.slow)]
)
def test_the_tutorial_from_its_first_line_to_its_last(extra, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = []
    for index, (language, text) in enumerate(BLOCKS):
        following = BLOCKS[index + 1][1] if index + 1 < len(BLOCKS) else ""
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", text)[1]
            (tmp_path / name).write_text(text)
        elif language == "bash":
            status = follow(text, extra if "chopgrad-align align" in text else ())
            captured = capsys.readouterr()
            done.append(re.search(r"chopgrad-align ([\w-]+)", text)[1])
            assert status == (2 if "# fails" in text else 0), captured.err
            if following.startswith("clip"):  # the figures are those of a machine, the rest is what is printed
                labels = [line[:20] for line in following.splitlines()]
                assert [line[:20] for line in captured.out.splitlines()] == labels
                assert captured.out.splitlines()[1:4] == following.splitlines()[1:4]
            if following.startswith("error"):
                assert following.split("(…)")[0] in captured.err
    assert done == ["check-reward", "check-reward", "align", "score", "check-reward", "check-reward"]

    run = tmp_path / "runs" / "warm"
    for row in rows(run):
        assert {"warm/score", "warm/value", "video/score"} <= row.keys()
        assert row["skipped"] == 0
    assert (run / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert len((tmp_path / "warmth.csv").read_text().splitlines()) == 1 + len(list((run / "samples/after").iterdir()))
    # The file says the same as the command.
    (section,) = [yaml.safe_load(text) for language, text in BLOCKS if language == "yaml"]
    config = load_config(run / "config.yaml")
    for key, reward in section["rewards"].items():
        for option, value in reward.items():
            found = getattr(config.rewards[key], option)
            assert {k: found[k] for k in value} == value if option == "args" else found == value


def test_the_template_of_whole_videos_takes_its_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = next(text for language, text in BLOCKS if text.startswith("# my_video_rewards.py"))
    (tmp_path / "my_video_rewards.py").write_text(text)
    reward = load_reward("my_video_rewards.py:Calm", strength=2.0, frames=4)
    assert reward.strength == 2.0
    assert not reward.training


def test_the_tutorial_names_every_rule_and_every_choice_of_frames():
    from chopgrad_align.objective.reward.frames import _COUNTED, _NAMED

    for name in _NAMED:
        assert f"`{name}`" in TUTORIAL
    for name in _COUNTED:
        assert f"{{{name}: " in TUTORIAL

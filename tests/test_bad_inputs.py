"""Whatever a user writes is taken, or answered by one sentence that names the place: no traceback, no hang."""

import copy
import dataclasses
import json
import math
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import tiny_runs
import torch
import yaml
from script_runs import run_script

from chopgrad_align.common.arguments import nearest
from chopgrad_align.common.errors import UsageError
from chopgrad_align.data.degradations import DEGRADATIONS, MASKS, load_degradation, load_mask
from chopgrad_align.data.prompts import read_conditions
from chopgrad_align.evaluation.witnesses import check_witnesses
from chopgrad_align.objective.reward.checking import check_reward
from chopgrad_align.training.build import load_models
from chopgrad_align.training.config import Config
from chopgrad_align.training.config_file import check_config, load_config
from chopgrad_align.training.run import check_files

LEAST = {
    "run": {"folder": "runs/least"},
    "model": {"name": "owner/name"},
    "data": {"train": "a.txt", "held_out": "b.txt"},
    "rewards": {"colour": {"name": "colorfulness"}},
    "train": {"steps": 3},
}
LONG = "x" * 300
ODD = [
    *(None, True, False, 0, -1, 1, 2, 1.5, 1e-4, 1e308, -math.inf, math.inf, math.nan, 10**30, 2**64),
    *("", " ", "3", "1e-4", "true", "a", "a/b", LONG, "a\0b", "a\nb", "\ud800", "é\u202e", b"a", "os:getcwd", ":", "~"),
    *([], {}, [[]], [None], [1, 2], [2, 1], ["a", "a"], [1, 2, 3], {"a": 1}, {1: 2}, {None: 1}, {"name": "a"}),
    *({"name": [1]}, {"a": {"name": "b", "c": 1}}, {LONG: {"name": "b"}}, [{"name": "blur"}]),
]


def answer(ask):
    """What a call says no with, on one line; None if it takes what it is given."""
    try:
        ask()
    except UsageError as error:
        text = str(error)
        assert "\n" not in text
        assert len(text) < 1200
        return text
    return None


def keys(kind, *path):
    """Every key of the config, with sections of the user's own names as `x`."""
    for name, hint in get_type_hints(kind).items():
        yield (*path, name)
        of = next((part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)), None)
        if of is not None:
            own = ("x",) if hint.__class__ is not type and getattr(hint, "__origin__", None) is dict else ()
            yield from keys(of, *path, name, *own)
        elif getattr(hint, "__origin__", None) is dict:
            yield (*path, name, "x")


@pytest.mark.parametrize("key", [*keys(Config)], ids=".".join)
def test_every_key_takes_or_refuses_every_value(key):
    for value in ODD:
        tree = section = copy.deepcopy(LEAST)
        for part in key[:-1]:
            section = section.setdefault(part, {})
        section[key[-1]] = value
        said = answer(lambda tree=tree: check_config(tree, "least.yaml"))
        assert said is None or key[0] in said or key[-1] in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=true"], r"train.steps: expected a number, got True$"),
        (["train.learning_rate=no"], r"train.learning_rate: expected a number, got False$"),
        (["train.steps=1e10"], r"train.steps: expected less than or equal to 2147483647, got 10000000000.0$"),
        (["run.seed=18446744073709551616"], r"run.seed: expected less than 18446744073709551616, got 18446744073"),
        (["run.seed=-1"], r"run.seed: expected greater than or equal to 0, got -1$"),
        ([f"run.folder={LONG}"], r"run.folder: expected a name of at most 255 bytes, got 'xxx.*…? of 300$"),
        (['run.folder="a\\0"'], r"run.folder: expected text without control characters, got 'a\\x00' with '\\x00'$"),
        (["model.name=''"], r"model.name: expected a name, got ''$"),
        ([f"rewards.{LONG}.name=a"], r"expected a name of at most 64 characters, .* got 'xxx"),
        (["rewards.heldout.name=colorfulness"], r"none of heldout, seconds, got 'heldout'$"),
        (["lora.targets=[]"], r"lora.targets: expected a list of strings, or one string, got \[\]$"),
        (["lora.targets=['']"], r"lora.targets: expected a list of strings, or one string, got \[''\]$"),
        (["gradient.distance=1"], r"gradient: distance has no effect with decoder=exact: leave it out$"),
        (["gradient.decoder=full", "gradient.rows=8"], r"gradient: rows has no effect with decoder=full: leave"),
        (["gradient={rows: 8, checkpoint: false}"], r"gradient: Exact\(rows=8, checkpoint=False\): rows are of one"),
        (["prediction.time=0.5"], r"prediction: time has no effect with mode=sample: leave it out$"),
        (["data.clips={}", "prediction={mode: one_step, times: [0.1, 0.2]}"], r"times has no effect with mode=one_s"),
        (["data.clips={}", "prediction={mode: denoise, times: [0.9, 0.2]}"], r"expected the lowest before the highest"),
        (
            ["data.clips={}", "prediction.mode=one_step", "gradient.last_steps=2"],
            r"gradient.last_steps and gradient.steps have no effect with prediction.mode=one_step",
        ),
        (["data.cache=c", "model.encode_prompts_once=false"], r"data.cache has nothing to keep with model.encode_pro"),
        (["rewards.colour.weight=0"], r"rewards.colour.weight=0 has no effect; .* witnesses.colour.name=colorfulness$"),
        (["trackers=[wandb, wandb]"], r"trackers: 'wandb' is there twice$"),
        (["validation.pairs=2000000"], r"validation.pairs: expected less than or equal to 1048576, got 2000000$"),
        (["train.batch_size=2000000000"], r"train.batch_size: expected less than or equal to 65536, got 2000000000$"),
        (["run.threads=100000"], r"run.threads: expected less than or equal to 4096, got 100000$"),
        (["data.clips.buckets=[[5, 100000, 16]]"], r"data.clips.buckets.0.1: expected less than or equal to 16384"),
        (["guard.bounds.motion=[1]"], r"guard.bounds.motion: expected a number, two in a list, or null, got \[1\]$"),
        (["data.clips.columnz=1"], r"unknown key 'data.clips.columnz'; did you mean 'columns'\?$"),
        (["run=[]"], r"^cannot read the override 'run=\[\]': "),
        (["trackers.0=wandb"], r"^cannot read the override 'trackers.0=wandb': Cannot merge|trackers: expected"),
        (["trackers[0]=wandb"], r"^cannot read the override 'trackers\[0\]=wandb'; write key.sub=value$"),
        (["train.steps.x=1"], r"train.steps: expected a valid integer, got {'x': 1}$"),
        (["train.steps=???"], r"the override 'train.steps=\?\?\?' gives no value$"),
        (["rewards={}"], r"the override 'rewards={}' would change nothing; to empty a section, leave out its keys"),
        (["~run"], r"'run' is missing$"),
        (["~run.folder"], r"'run.folder' is missing$"),
        (["~"], r"'~' leaves out a key that the config does not have$"),
        (["~a.b.c"], r"'~a.b.c' leaves out a key that the config does not have$"),
        (["run.folder=${run.folder}"], r"^cannot read the config .*Recursive interpolation"),
        (["run.folder=${model.name}", "model.name=${run.folder}"], r"^cannot read .*Recursive interpolation"),
        (["rewards.colour.args=" + "{a: " * 400 + "1" + "}" * 400], r"^cannot read the (override|config) .*deep"),
    ],
    ids=lambda value: value[0].partition("=")[0][:20] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_value_that_cannot_work(tmp_path, overrides, message):
    path = tmp_path / "least.yaml"
    path.write_text(yaml.safe_dump(LEAST))
    with pytest.raises(UsageError, match=message) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)


BOMB = "a: &a [1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run:\n\tfolder: a\n", "cannot read the config .* cannot start any token"),
        ("a: &a [*a]\n", "its aliases make it grow beyond measure"),
        (BOMB, "aliases make it grow"),
        ("[" * 5000, "cannot read the config .* nest"),
        ("a: !!python/object:os.system x\n", "cannot read the config .* could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "cannot read the config .* single document"),
        ("a: ${oc.env:NO_SUCH_VARIABLE}\n", "cannot read the config .*'NO_SUCH_VARIABLE' not found"),
        (b"\x00\x01", "cannot read the config .* not allowed"),
        (b"#" * 2**21, "has more than 1,048,576 bytes"),
        ("\n".join(f"k{i}: 1" for i in range(50)), "and 49 more$"),
    ],
    ids=["tab", "self", "bomb", "deep", "tag", "two", "environment", "binary", "huge", "many"],
)  # fmt: skip
def test_a_config_file_that_cannot_work(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert answer(lambda: load_config(path))
    with pytest.raises(UsageError, match=message):
        load_config(path)


def test_numbers_are_taken_as_yaml_and_the_environment_write_them(tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(LEAST))
    monkeypatch.setenv("STEPS", "7")
    config = load_config(path, ["train.learning_rate=1e-4", "train.steps=${oc.env:STEPS}", "train.weight_decay=1"])
    assert (config.train.learning_rate, config.train.steps, config.train.weight_decay) == (1e-4, 7, 1.0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "a\0b", r"line 1: column 'prompt': expected text without control characters"),
        ("p.jsonl", '{"prompt": "\\ud800"}', r"line 1: column 'prompt': expected text without control characters"),
        ("p.jsonl", "[" * 100_000, r"line 1: nested too deeply; write one object a line"),
        ("p.jsonl", '{"prompt": "a", "weight": ' + "9" * 5000 + "}", r"line 1: not JSON"),
        ("p.jsonl", '{"prompt": "a", "weight": ' + "9" * 400 + "}", r"line 1: expected a finite number as `weight`"),
        ("p.jsonl", '{"prompt": "a", "weight": true}', r"line 1: expected a finite number as `weight`, got True"),
        ("p.txt", "a" * 30_000, r"line 1: column 'prompt': a text of 30,000 characters, .* a row or line of its own"),
        ("p.csv", "prompt,prompt\na,b\n", r"has two columns 'prompt'"),
        ("p.csv", 'prompt\n"a\n', r"not CSV .*close quotes"),
        ("p.csv", f"image\n{LONG}.png\n", r"line 2: expected a name of at most 255 bytes"),
        (f"{LONG}.txt", None, r"expected a name of at most 255 bytes"),
        ("folder.txt", None, r"holds no pictures"),
    ],
    ids=["nul", "surrogate", "deep", "digits", "huge", "boolean", "long", "twice", "quote", "image", "name", "folder"],
)  # fmt: skip
def test_a_prompt_file_that_cannot_work(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    elif len(name) < 255:
        path.mkdir()
    with pytest.raises(UsageError, match=message) as caught:
        read_conditions(path)
    assert len(str(caught.value)) < 600


def test_a_long_cell_in_a_column_that_is_not_read(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(f"prompt,embedding\na star,{'1 ' * 200_000}\n")
    assert [condition.prompt for condition in read_conditions(path)] == ["a star"]


@pytest.mark.parametrize("name", [*DEGRADATIONS, *MASKS])
def test_degradations_take_or_refuse_every_setting(name):
    kind, load = (DEGRADATIONS[name], load_degradation) if name in DEGRADATIONS else (MASKS[name], load_mask)
    for value in ODD:
        answer(lambda value=value: load(value))
        for setting in dataclasses.fields(kind):
            answer(lambda value=value, setting=setting: load({"name": name, setting.name: value}))


REWARDS = """
import sys
class Broken:
    def __init__(self, x=1): raise KeyError("no")
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.call.num_inference_steps=0"], r"num_inference_steps=0: expected a whole number, 1 or more"),
        (["model.call.num_inference_steps=5000"], r"num_inference_steps: expected at most 1000"),
        (["model.call.num_videos_per_prompt=2"], r"model.call.num_videos_per_prompt: every video of a run is made of"),
        (["model.call.negative_prompt=[a]"], r"model.call.negative_prompt: expected one text, for all videos"),
        (["model.call.prompt=a"], r"model.call: prompt is set for each video of a run"),
        (["model.call.self=1"], r"model.call.self: a config cannot give it"),
        (["model.call.callback_on_step_end=1"], r"model.call.callback_on_step_end: a config cannot give it"),
        (["model.call.attention_kwargs=1"], r"model.call.attention_kwargs: expected values by name, got 1"),
        (["gradient.last_steps=4"], r"model.call: LastSteps.* asks for 4 steps, but the sampler takes 3"),
        (["model.scheduler.flow_shift=-1"], r"model.scheduler.flow_shift: expected a number above 0, got -1$"),
        (["model.scheduler.flow_shift=high"], r"model.scheduler.flow_shift: expected float, got 'high'$"),
        (["model.scheduler.num_train_timesteps=true"], r"model.scheduler.num_train_timesteps: expected int, got True$"),
        (["model.scheduler.num_train_timesteps=-1"], r"model.scheduler: UniPC\w+ with {'num_train_timesteps': -1} can"),
        (["model.scheduler.self=1"], r"model.scheduler: UniPC\w+ has no setting 'self'"),
        (["model.scheduler={name: [1]}"], r"model.scheduler.name: diffusers has no \[1\]"),
        (["model.scheduler={name: DDIMScheduler, beta_schedule: x}"], r"DDIM\w+ cannot sample .*: x is not imple"),
        (["model.scheduler={name: DDIMScheduler, prediction_type: epsilon}"], r"predicts velocities of a flow: at the"),
        (["lora.rank=1000"], r"lora.rank=1000: the targets in transformer have full rank at \d+; choose less$"),
        (["lora.targets='.*'"], r"lora: peft refuses the targets or settings for transformer \(Target module"),
        (["rewards.x.name=r.py:Broken"], r"rewards.x: reward 'r.py:Broken' cannot be made with no arguments; it"),
        (["rewards.x.name=exit.py:A"], r"rewards.x: .* importing exit.py failed at .*exit.py:1: SystemExit: 3$"),
        (["rewards.x={name: colorfulness, args: {name: a}}"], r"rewards.x: .*unexpected keyword argument 'name'"),
        (["rewards.x={name: colorfulness, args: {frames: [1]}}"], r"rewards.x: .*frames=\[1\]: expected"),
        ([f"rewards.x.name={'y' * 250}.py/z.py:A"], r"rewards.x: .*no such file"),
    ],
    ids=lambda value: value[0].partition("=")[0][:30] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_does_not_fit_the_model_is_said_before_sampling(model, tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(REWARDS)
    (tmp_path / "exit.py").write_text("raise SystemExit(3)")
    config = tiny_runs.config(tmp_path, model, *overrides)
    with pytest.raises(UsageError, match=message) as caught:
        load_models(config, torch.device("cpu"), lambda pipe: [config.model.call])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "cannot load .* not a valid JSON file"),
        ("[]", "cannot load"),
        (json.dumps({"_class_name": "NoPipe"}), "no attribute NoPipe"),
        (json.dumps({"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"]}), "no file named config"),
    ],
    ids=["cut", "list", "class", "empty"],
)  # fmt: skip
def test_a_model_folder_of_another_kind(tmp_path, index, message):
    (tmp_path / "model_index.json").write_text(index)
    config = tiny_runs.config(tmp_path, tmp_path)
    with pytest.raises(UsageError, match=f"^model.name: cannot load .*{message.removeprefix('cannot load')}"):
        load_models(config, torch.device("cpu"), lambda pipe: [config.model.call])


def test_a_cache_that_is_a_file(model, tmp_path):
    config = tiny_runs.config(tmp_path, model, f"data.cache={tmp_path}/train.txt/cache")
    with pytest.raises(UsageError, match=r"data.cache: cannot write to .*train.txt; choose another folder"):
        check_files(config)


def test_a_reward_or_a_witness_that_fails_is_said_with_its_place():
    def fails(*args):
        raise RuntimeError("no\nvideo")

    with pytest.raises(UsageError, match=r"^reward 'x', on a video .*, failed at .*: RuntimeError: no video$"):
        check_reward(fails, "x")
    with pytest.raises(UsageError, match=r"^witnesses.x, on a video .*, failed at .*: RuntimeError: no video$"):
        check_witnesses({"x": SimpleNamespace(observe=fails, module=None)}, ["a"], 2, (8, 8), torch.device("cpu"))


def test_a_first_image_that_is_no_picture(model, tmp_path):
    config = tiny_runs.config(tmp_path, model, "data.train=t.csv".replace("t.csv", str(tmp_path / "t.csv")))
    (tmp_path / "t.csv").write_text("prompt,image\na,train.txt\n")
    with pytest.raises(UsageError, match=r"cannot read the image .*train.txt .*give a picture"):
        check_files(config)


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [("wight", ["weight"], "weight"), ("Weight", ["weight"], "weight"), ("optimizer", ["objective", "mode"], "")],
    ids=["letter", "case", "far"],
)
def test_only_what_is_near_is_offered(name, known, hint):
    assert nearest(name, known) == (f"; did you mean {hint!r}?" if hint else "")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("align.py", "--profile -1", "--profile: expected a whole number, 0 or more and below 2^63, got '-1'"),
        ("align.py", f"--config {LONG}", "expected a name of at most 255 bytes"),
        ("check_reward.py", "colorfulness --device nothing", "--device: no device 'nothing' here"),
        ("check_reward.py", f"colorfulness --video {LONG}", "--video: expected a name of at most 255 bytes"),
        ("evaluate.py", f"--pred {LONG} --target t --out o", "--pred: expected a name of at most 255 bytes"),
        ("evaluate.py", "--out o --count 0", "--count: expected a whole number, 1 or more, got '0'"),
        ("generate.py", "--prompt a", "arguments are required: --out"),
        ("generate.py", "--prompt a --out o --size 0x0", "--size: expected HEIGHTxWIDTH"),
        ("generate.py", "--prompt a --out o --fps 1e300", "--fps: expected 0.01 to 1000 frames a second, got 1e300"),
        ("generate.py", "--prompt a --out o --seed 99999999999999999999", "--seed: expected a whole number"),
        ("generate.py", "--prompt a --out o --guidance nan", "--guidance: expected a finite number, got 'nan'"),
        ("generate.py", f"--prompt a --out {LONG}", "--out: expected a name of at most 255 bytes"),
        ("make_clips.py", "--out o --size 0", "--size: expected a whole number, 1 or more"),
        ("plan.py", "--gpu many", "--gpu=many: expected a number with GiB"),
        ("score.py", f"--reward colorfulness --video {LONG}", "--video: expected a name of at most 255 bytes"),
        ("score.py", "--reward colorfulness --video v.mp4", "v.txt: not UTF-8; save it in that encoding"),
    ],
    ids=lambda value: value if value.endswith(".py") else "",
)  # fmt: skip
def test_a_bad_argument_of_a_script_is_one_line(script, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v.txt").write_bytes(b"\xff")
    (tmp_path / "v.mp4").write_bytes(b"x")
    status, _, error = run_script(script, monkeypatch, capsys, *arguments.split())
    assert status == 2
    assert message in error
    assert error.count("\n") == 1

"""Config files: complete, read back as written, and every mistake is one line that can be acted on."""

import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from chopgrad_align import LastSteps, RandomLast
from chopgrad_align.common.errors import UsageError
from chopgrad_align.data.prompts import read_conditions
from chopgrad_align.decoding.backprop import Exact, Full, Truncated
from chopgrad_align.training.config import Gradient
from chopgrad_align.training.config_file import load_config, to_yaml

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

LEAST = """
run: {folder: runs/least}
model: {name: owner/name}
data: {train: a.txt, held_out: b.txt}
rewards:
  colour: {name: colorfulness}
train: {steps: 3}
"""


@pytest.fixture
def least(tmp_path):
    path = tmp_path / "least.yaml"
    path.write_text(LEAST)
    return path


def align(*arguments):
    """Run `scripts/align.py` as a user does."""
    command = [sys.executable, ROOT / "scripts" / "align.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_is_complete_and_opens_with_its_launch_command(path, tmp_path):
    config = load_config(path)
    named = "" if path.stem == "embedded" else f" --config {path.relative_to(ROOT)}"
    first, second = path.read_text().splitlines()[:2]
    assert first == f"# accelerate launch scripts/align.py{named}"
    assert second.startswith(f"{first} ")  # an example of overrides, which must work
    overrides = second.removeprefix(first).split()
    assert overrides
    assert load_config(path, overrides) != config

    assert config.run.folder == f"runs/{path.stem}"
    assert config.train.batch_size % config.train.micro_batch == 0
    assert {"height", "width", "num_frames", "num_inference_steps"} <= config.model.call.keys()
    assert read_back(config, tmp_path) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_prompts_of_a_shipped_config_are_there_and_the_held_out_ones_are_others(path):
    data = load_config(path).data
    if data.clips is not None or data.train.startswith("data/"):  # the user's own clips or first frames
        texts = [file.read_text() for file in (path, *bases_of(path))]
        assert any("yours to bring" in text or "make_clips.py" in text for text in texts)
        return
    train, held_out = ({c.prompt for c in read_conditions(file)} for file in (data.train, data.held_out))
    assert len(train) >= 64
    assert len(held_out) >= 32
    assert not train & held_out


def read(path):
    """What a file itself says, and the files that it extends."""
    tree = yaml.safe_load(path.read_text())
    bases = tree.pop("extends", [])
    return tree, [path.parent / base for base in ([bases] if isinstance(bases, str) else bases)]


def bases_of(path):
    for base in read(path)[1]:
        yield from bases_of(base)
        yield base


def leaves(tree, *path):
    if isinstance(tree, dict) and tree:
        return {key: value for name, part in tree.items() for key, value in leaves(part, *path, name).items()}
    return {path: tree}


def merged(path):
    """The leaves of a file and of all that it extends; none of them may say again what is already there."""
    tree, bases = read(path)
    found = {}
    for base in bases:
        part = merged(base)
        assert not (again := {".".join(key) for key in part if found.get(key, ...) == part[key]}), (path, base, again)
        found |= part
    again = {".".join(key) for key, value in leaves(tree).items() if found.get(key, ...) == value}
    assert not again, f"{path} repeats {again}"
    return found | leaves(tree)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_nothing_in_a_shipped_config_is_written_twice(path):
    merged(path)


def test_a_config_extends_others(tmp_path, least):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "first.yaml").write_text("extends: ../least.yaml\nlora: {rank: 2, alpha: 3.0}\n")
    (tmp_path / "base" / "second.yaml").write_text("lora: {rank: 4}\ndata: {train: '${configs:prompts/train.txt}'}\n")
    path = tmp_path / "own.yaml"
    path.write_text("extends: [base/first.yaml, base/second.yaml]\nlora: {targets: [to_q]}\ntrain: {steps: 5}\n")
    config = load_config(path, ["train.batch_size=2"])
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (4, 3.0, ["to_q"])
    assert (config.train.steps, config.train.batch_size) == (5, 2)
    assert (config.run.folder, config.data.held_out) == ("runs/least", "b.txt")
    assert config.data.train == str(ROOT / "configs" / "prompts" / "train.txt")
    written = to_yaml(config)
    assert "extends" not in written
    assert read_back(config, tmp_path) == config


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("absent.yaml", r"own\.yaml extends .*absent\.yaml, which is not there"),
        ("own.yaml", r"in a circle: own\.yaml → own\.yaml"),
        ("there.yaml", r"in a circle: own\.yaml → there\.yaml → own\.yaml"),
        ("3", r"extends: expected a file or a list of files, got 3"),
        ("{a: b}", r"extends: expected a file or a list of files, got"),
        ("[wrong.yaml]", r"wrong\.yaml must be a mapping"),
    ],
    ids=["absent", "itself", "circle", "number", "section", "list"],
)
def test_a_base_that_cannot_be_extended_is_one_line(tmp_path, extends, message):
    (tmp_path / "there.yaml").write_text("extends: own.yaml\n")
    (tmp_path / "wrong.yaml").write_text("- 1\n")
    path = tmp_path / "own.yaml"
    path.write_text(f"extends: {extends}\n{LEAST}")
    with pytest.raises(UsageError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_the_page_of_configs_is_made_from_them(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import list_configs

    assert list_configs.PAGE.read_text() == list_configs.page()
    for path in CONFIGS:
        header = list_configs.header(path)
        published = load_config(path).model.name.count("/") == 1
        assert header.text
        assert not published or "https://" in header.sources or "https://" in header.text, path.stem


def read_back(config, folder):
    path = folder / "written.yaml"
    path.write_text(to_yaml(config))
    return load_config(path)


def test_without_a_file_the_embedded_config_is_read():
    assert load_config(None) == load_config(ROOT / "configs" / "embedded.yaml")
    assert load_config(None).model.name == str(files("chopgrad_align") / "embedded" / "pipeline")


def test_overrides(least, tmp_path):
    overrides = [
        "train.steps=7",
        "train.betas=[0.5,0.9]",
        "lora.targets=[to_q,to_k]",
        "model.call.height=64",
        "model.scheduler.flow_shift=3.5",
        "rewards.colour.weight=-2",
        "rewards.more={name: hps_v2, cap: 0.3, normalize: true, args: {version: v2.0, frames: {random: 4}}}",
        "rewards.level={name: sharpness, target: 40, args: {frames: first+last}}",
        "lora.alpha=8",
        "data.train=${configs:prompts/train.txt}",
        "trackers=[tensorboard]",
    ]
    config = load_config(least, overrides)
    assert config.train.steps == 7
    assert config.train.betas == (0.5, 0.9)
    assert config.lora.targets == ["to_q", "to_k"]
    assert config.model.call == {"height": 64}
    assert config.model.scheduler == {"flow_shift": 3.5}
    assert config.rewards["colour"].weight == -2
    more, level = config.rewards["more"], config.rewards["level"]
    assert more.args == {"version": "v2.0", "frames": {"random": 4}}
    assert (more.cap, more.target, more.normalize) == (0.3, None, True)
    assert (level.cap, level.target, level.normalize, level.args) == (None, 40, False, {"frames": "first+last"})
    assert config.lora.alpha == 8
    assert Path(config.data.train).is_file()
    assert config.trackers == ["tensorboard"]
    assert read_back(config, tmp_path) == config
    assert read_back(replace(config, trackers=[]), tmp_path) != config
    assert load_config(least, ["lora.targets=.*to_[qkv]"]).lora.targets == ".*to_[qkv]"


def test_the_section_on_gradients_becomes_a_policy():
    assert Gradient().policy() == Exact()
    assert Gradient(cache="host", checkpoint=False, saturated="pass").policy() == Exact(
        cache="host", checkpoint=False, saturated="pass"
    )
    assert Gradient(decoder="truncated", distance=2).policy() == Truncated(2)
    assert Gradient(decoder="full").policy() == Full()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.step=3"], r"least.yaml: unknown key 'train.step'; did you mean 'steps'\?$"),
        (["optimizer=adam"], r"least.yaml: unknown key 'optimizer'; at the top level there are run, model, data, "),
        (["rewards.colour.wight=2"], r"unknown key 'rewards.colour.wight'; did you mean 'weight'\?$"),
        (
            ["gradient.decoder=exakt"],
            r"least.yaml: gradient: no decoder policy is called 'exakt'; did you mean 'exact'\? Known: exact, full",
        ),
        (["train.steps=many"], r"least.yaml: train.steps: expected a valid integer, .*got 'many'$"),
        (["train.steps=2.5"], r"least.yaml: train.steps: expected a valid integer, .*got 2.5$"),
        (["train.steps=0"], r"least.yaml: train.steps: expected greater than or equal to 1, got 0$"),
        (["train.steps=null"], r"least.yaml: train.steps: expected a valid integer, got None$"),
        (["train.learning_rate=-1"], r"train.learning_rate: expected greater than 0, got -1$"),
        (["train.learning_rate=.nan"], r"train.learning_rate: expected a finite number, got nan$"),
        (["train.betas=[0.9]"], r"'train.betas.1' is missing$"),
        (["train.betas=[0.9,1.0]"], r"train.betas.1: expected less than 1, got 1.0$"),
        (["validation.pairs=1"], r"validation.pairs: expected greater than or equal to 2, got 1$"),
        (["lora.targets=3"], r"least.yaml: lora.targets: expected a list of strings, or one string, got 3$"),
        (["lora.targets=[to_q,[]]"], r"lora.targets: expected a list of strings, or one string, got \['to_q', \[\]\]$"),
        (
            ["model.gradient_checkpointing=perhaps"],
            r"model.gradient_checkpointing: expected a valid boolean, .*'perhaps'",
        ),
        (["model.call=3"], r"model.call: expected a valid dictionary, got 3$"),
        (["model.offload=blocks"], r"model.offload=blocks: .*; set gradient.denoiser.checkpoint=block$"),
        (
            ["model.offload=blocks", "gradient.denoiser.checkpoint=block", "parallel.shard=2"],
            r"model.offload=blocks moves whole weights, which parallel.shard=2 shards: leave one of them out$",
        ),
        (["gradient.denoiser.inputs=host"], r"checkpoint='call', inputs='host'\): .*; use checkpoint='block'$"),
        (["gradient.decoder=full", "gradient.cache_sets=3"], r"cache_sets has no effect with decoder=full"),
        (
            ["rewards.colour=colorfulness"],
            r"rewards.colour: expected a section with the keys name, weight, cap, target, normalize, args, got 'c",
        ),
        (["rewards.colour.normalise=true"], r"unknown key 'rewards.colour.normalise'; did you mean 'normalize'\?$"),
        (["rewards.colour.cap=high"], r"rewards.colour.cap: expected a valid number, .*got 'high'$"),
        (["rewards.colour.cap=.inf"], r"rewards.colour.cap: expected a finite number, got inf$"),
        (["rewards.colour.cap=3", "rewards.colour.target=2"], r"rewards.colour: give a cap or a target, not both$"),
        (
            ["data.clips={}", "losses={l: {name: latent}}"],
            r"least.yaml: losses.l.name=latent: a loss of latents needs prediction.mode=one_step or denoise$",
        ),
        (
            ["data.clips={}", "losses={l: {name: diffusion}}", "prediction.mode=one_step"],
            r"least.yaml: losses.l.name=diffusion: a loss of outputs needs prediction.mode=denoise$",
        ),
        (["trackers=[mlflow]"], r"trackers.0: expected 'tensorboard' or 'wandb', got 'mlflow'$"),
        (["run=null"], r"run: expected a section with the keys folder, seed, threads, got None$"),
        (["train.step=3", "train.steps=0"], r"train.steps: expected .*; unknown key 'train.step'"),
        (["steps"], r"^cannot read the override 'steps'; write key.sub=value$"),
        (["--steps=3"], r"^cannot read the override '--steps=3'; write key.sub=value$"),
        (["train.steps=${nothing}"], r"^cannot read the config .*least.yaml: .*'nothing' not found"),
        (["train.steps=[1"], r"^cannot read the override 'train.steps=\[1': while parsing"),
    ],
)
def test_a_wrong_value_is_one_line(least, overrides, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_config(least, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LEAST.replace("train: {steps: 3}", ""), r"'train' is missing$"),
        (LEAST.replace("{steps: 3}", "{}"), r"'train.steps' is missing$"),
        (LEAST.replace("{name: colorfulness}", "{weight: 2}"), r"'rewards.colour.name' is missing$"),
        (
            LEAST.replace("rewards:\n  colour: {name: colorfulness}", "rewards: {}"),
            r"expected at least one term under rewards or losses",
        ),
        ("- a\n- b\n", r"must be a mapping of sections, such as run, model and train$"),
        ("just words\n", r"'run' is missing; .*; unknown key 'just words'"),
        ("", r"'run' is missing; 'model' is missing; .*'train' is missing$"),
        ("run: {folder: [\n", r"^cannot read the config .*wrong.yaml: .*line 2"),
        ("run: {folder: a}\nrun: {folder: b}\n", r"^cannot read the config .*duplicate key run"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(
        UsageError, match=r"^no config file no/such.yaml; in configs/ there are anim.*, embedded.yaml, .*, svd"
    ):
        load_config("no/such.yaml")
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"run: \xff\xfe")
    with pytest.raises(UsageError, match=r"^cannot read the config .*bytes.yaml"):
        load_config(path)


def test_from_the_command_line(least, tmp_path):
    printed = align("--config", least, "train.steps=5", "--print-config")
    assert printed.returncode == 0, printed.stderr
    (tmp_path / "printed.yaml").write_text(printed.stdout)
    assert load_config(tmp_path / "printed.yaml") == load_config(least, ["train.steps=5"])

    failed = align("--config", least, "train.learning_rat=1")
    assert failed.returncode == 2
    expected = f"error: {least}: unknown key 'train.learning_rat'; did you mean 'learning_rate'?\n"
    assert failed.stderr == expected
    assert not failed.stdout


def test_a_key_can_be_left_out(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(LEAST.replace("rewards:\n", "rewards:\n  other: {name: sharpness}\n"))
    assert load_config(path).rewards.keys() == {"colour", "other"}
    assert load_config(path, ["~rewards.other"]).rewards.keys() == {"colour"}
    with pytest.raises(UsageError, match=r"'~rewards.others' leaves out a key that the config does not have"):
        load_config(path, ["~rewards.others"])


def test_policies_by_name(least):
    def gradient(*overrides):
        return load_config(least, overrides).gradient

    assert gradient().step_policy() == LastSteps(1)
    assert gradient("gradient.last_steps=2").step_policy() == LastSteps(2)
    drawn = gradient("gradient.steps={name: random_last, args: {count: 3, detach_input: true}}")
    assert drawn.step_policy() == RandomLast(3, detach_input=True)
    assert gradient("gradient.decoder=chopgrad_align:Truncated", "gradient.args.distance=2").policy() == Truncated(2)

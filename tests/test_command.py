"""The console command: its commands, what the wheel alone can do, and the notebook."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import pytest
from script_runs import SCRIPTS
from test_package import MODULES, imports

import chopgrad_align
from chopgrad_align.__main__ import COMMANDS, main
from chopgrad_align.training.config_file import load_config

ROOT = Path(__file__).parents[1]
# The embedded pipeline's run in a minute.
SHORT = [
    *("train.steps=2", "train.batch_size=2", "train.micro_batch=2", "validation.pairs=2", "validation.videos=2"),
    *("model.call.num_frames=5", "model.call.num_inference_steps=2", "gradient.steps.args.count=1"),
]


def run(capsys, *arguments):
    """Exit status, standard output and standard error of the command."""
    status = 0
    try:
        main(arguments)
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command, capsys):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert out.startswith(f"usage: chopgrad-align {command} ")
    assert re.search(rf"^ *chopgrad-align {command} ", out, re.MULTILINE)  # an example
    assert "scripts/" not in out


def test_help_lists_all_commands(capsys):
    for arguments in ([], ["--help"]):
        status, out, _ = run(capsys, *arguments)
        assert status == 0
        assert all(f"\n    {command}" in out for command in COMMANDS)


def test_unknown_command(capsys):
    status, _, err = run(capsys, "algin")
    assert status == 2
    assert "'algin'" in err
    assert "align" in err
    assert err.count("\n") == 1


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"{chopgrad_align.__version__}\n")
    assert chopgrad_align.__version__ == version("chopgrad-align")


def test_scripts_of_commands_are_the_commands():
    for command in COMMANDS:
        name = command.replace("-", "_")
        text = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
        assert f"from chopgrad_align.commands.{name} import main\n" in text
        assert len(text.splitlines()) < 8


def test_a_config_of_the_package_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = [load_config(name) for name in ("sr_x4", "sr_x4.yaml", "configs/sr_x4.yaml", ROOT / "configs/sr_x4.yaml")]
    assert all(config == named[0] for config in named)
    (tmp_path / "sr_x4").write_text("run: {folder: own}\n")
    with pytest.raises(chopgrad_align.UsageError, match=r"sr_x4: .*missing"):
        load_config("sr_x4")


def test_modules_that_only_unix_has_are_optional(monkeypatch):
    unix = {"fcntl", "grp", "posix", "pwd", "pty", "resource", "syslog", "termios", "tty"}
    users = {module for module in MODULES if imports(module) & unix}
    assert users == {"chopgrad_align.training.phases"}
    monkeypatch.setitem(sys.modules, "resource", None)  # lets its import fail
    spec = importlib.util.spec_from_file_location(
        "chopgrad_align.training._phases", MODULES["chopgrad_align.training.phases"]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.resource is None


# --- the wheel alone --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of commands of an environment with the wheel, beside the libraries of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = (
        folder / "source"
    )  # in the tree itself setuptools would leave a build folder, and pack what one held before
    for name in ("chopgrad_align", "rewards", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv")
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    # Editable installs of this environment, such as the package's own, are not seen through this: their .pth files are
    # read in site folders alone.
    (site / "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    python = folder / "venv" / "bin" / "python"
    subprocess.run(
        [*pip, "--python", python, "install", "--ignore-installed", "--no-deps", "--no-index", str(wheel)], check=True
    )
    return python.parent


def in_folder(folder, *command):
    """Standard output and standard error of a command that starts in a folder, without this repository."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
def test_the_wheel_alone_trains_reports_generates_and_scores(installed, tmp_path):
    command = installed / "chopgrad-align"
    code = "import chopgrad_align, chopgrad_rewards, chopgrad_configs as c; print(chopgrad_align.__file__, c.__file__)"
    assert str(ROOT) not in in_folder(tmp_path, installed / "python", "-c", code)[0]

    out, err = in_folder(tmp_path, command, "align", *SHORT)
    assert "look at runs/embedded/report.html" in out
    assert "were not passed to" not in err  # the launcher's warning
    run = tmp_path / "runs" / "embedded"
    assert run.joinpath("config.yaml").read_text().startswith("# chopgrad-align align --config runs/embedded/config")
    assert [json.loads(line)["step"] for line in run.joinpath("metrics.jsonl").read_text().splitlines()][-1] == 2

    (run / "report.html").unlink()
    in_folder(tmp_path, installed / "python", "-m", "chopgrad_align", "report", run)
    assert (run / "report.html").is_file()
    in_folder(tmp_path, command, "generate", "--run", run, "--prompt", "a red star", "--out", "videos")
    assert (tmp_path / "videos" / "000-a-red-star.mp4").is_file()
    out, _ = in_folder(tmp_path, command, "score", "--reward", "colorfulness", "--video", "videos", "--prompt", "")
    assert out.startswith("video,prompt,score,error\n")


# --- the notebook -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_notebook_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chopgrad_align, "load_config", lambda path, own: load_config(path, [*own, *SHORT]))
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]  # they would be those of another version
            source = "".join(line for line in cell["source"] if not line.startswith("%"))
            exec(compile(source, cell["id"], "exec"), names)
    assert names["result"] is not None
    assert names["video"].shape == (5, 3, 64, 64)

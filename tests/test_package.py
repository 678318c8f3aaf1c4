"""The package as a whole: what imports what, how it loads, and that it brings its data along."""

import ast
import graphlib
import importlib.util
import inspect
import json
import statistics
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path

import pytest

import chopgrad_align

ROOT = Path(__file__).parents[1]
FOLDERS = {"chopgrad_align": ROOT / "chopgrad_align", "chopgrad_rewards": ROOT / "rewards"}


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = _modules()


def imports(module: str, at_once: bool = False) -> set[str]:
    """The modules that a module names in import statements, as absolute names.

    `at_once` leaves those out that stand in functions.
    """
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    later = {id(node) for function in functions for node in ast.walk(function)} if at_once else set()
    for node in ast.walk(tree):  # what type checkers alone see is not imported
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            later |= {id(part) for part in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in later:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = MODULES[module].name == "__init__.py"
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *filter(None, [base])])
            # `from .training import loop` names a module; `from .decode import decode` a thing in one
            found |= {name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return found


def importers(name: str) -> set[str]:
    """The modules that import `name`, a library or a part of this package, or something in it."""
    return {m for m in MODULES if any(f"{i}.".startswith(f"{name}.") for i in imports(m))}


def within(modules: set[str], *allowed: str) -> bool:
    return all(any(f"{m}.".startswith(f"chopgrad_align.{a}.") for a in allowed) for m in modules)


# --- what imports what ------------------------------------------------------------------------------------------------

# The mathematics, from the bottom up: torch, and what stands before it here. So it can be read, and used, without any
# model library.
CORE = [
    *(
        "common.errors",
        "common.arguments",
        "common.loading",
        "common.storage_count",
        "common.stored_tensors",
        "common.versions",
        "common",
    ),
    *("objective", "objective.reading"),
    *("decoding", "decoding.reproducible_state", "decoding.offload", "sampling", "sampling.steps"),
    *("sampling.method_replacement", "sampling.randomness", "sampling.recomputation", "sampling.sampling_loop"),
    *("sampling.denoisers", "sampling.checkpointing", "sampling.block_offload"),
    *("sampling.guidance_branches", "sampling.key_value_cache", "sampling.gradient_steps", "sampling.last_step"),
    *("sampling.outputs", "sampling.postprocessing", "sampling.call_shape"),
    *(
        f"objective.reward{part}"
        for part in (".frames", ".reduction", ".samples", ".protocol", ".loading", ".checking", "")
    ),
    *(f"objective.losses{part}" for part in (".protocol", ".loading", "")),
    *("decoding.decoders.base", "decoding.decoders", "decoding.clamp"),
    *("decoding.onednn", "decoding.memory_efficient_layers", "decoding.graph"),
    *("decoding.binomial", "decoding.recurrence", "decoding.groupwise", "decoding.backprop", "decoding.decode"),
    "sampling.call_checks",
]


def beyond(core: list[str], found: set[str]) -> set[str]:
    """The imports that are neither torch's nor the standard library's nor these modules."""
    ours = {f"chopgrad_align.{name}" for name in core}
    return {i for i in found - ours if i.split(".")[0] not in {"torch", *sys.stdlib_module_names}}


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_torch_alone(name):
    assert not beyond(CORE[: CORE.index(name)], imports(f"chopgrad_align.{name}"))


def test_the_rollout_imports_torch_alone_until_it_runs():
    assert not beyond(CORE, imports("chopgrad_align.sampling.differentiable", at_once=True))
    assert not beyond([*CORE, "sampling.differentiable"], imports("chopgrad_align.sampling.rollout", at_once=True))


def test_model_libraries_stay_where_they_belong():
    above = ("planner", "benchmark", "commands")
    assert within(importers("diffusers"), "decoding.decoders", "sampling", "training", *above)
    assert within(importers("peft"), "training")
    assert within(importers("accelerate"), "training")


def test_imports_point_down():
    assert within(importers("chopgrad_align.training"), "training", "planner", "benchmark", "commands")
    assert within(importers("chopgrad_align.evaluation"), "evaluation", "training", "planner", "commands")
    assert within(importers("chopgrad_align.commands"), "commands", "__main__")
    ours = {module: imports(module) & MODULES.keys() for module in MODULES}
    graphlib.TopologicalSorter(ours).prepare()  # raises for a cycle, and names it


def test_rewards_know_the_protocol_and_nothing_knows_them():
    rewards = {module for module in MODULES if module.split(".")[0] == "chopgrad_rewards"}
    assert importers("chopgrad_rewards") <= rewards
    used = {i for module in rewards for i in imports(module) if i.split(".")[0] == "chopgrad_align"}
    assert all(f"{name}.".startswith("chopgrad_align.common.") or name == "chopgrad_align" for name in used)


# --- how it loads -----------------------------------------------------------------------------------------------------


def _run(code: str, folder: Path) -> str:
    """Its output, in a fresh interpreter that was started elsewhere."""
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_costs_little_more_than_torch_and_loads_nothing_heavy(tmp_path):
    code = (
        "import json, sys, time; import torch; start = time.perf_counter()\n"
        "from chopgrad_align import decode, decode_loss, rollout, Exact, Truncated, Full, LastSteps, load_reward\n"
        "print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))"
    )
    seconds, loaded = zip(*(json.loads(_run(code, tmp_path)) for _ in range(3)), strict=True)
    assert statistics.median(seconds) < 2
    heavy = {"accelerate", "av", "chopgrad_rewards", "diffusers", "matplotlib", "open_clip", "peft", "transformers"}
    assert not heavy & set(loaded[0])


def test_functions_keep_their_names_whatever_is_imported_first(tmp_path):
    _run(
        """
import importlib, itertools, sys, types
import torch
modules = ["", ".decoding.decode", ".sampling.rollout", ".objective.reward"]
for order in itertools.permutations(modules):
    for name in [name for name in sys.modules if name.split(".")[0] == "chopgrad_align"]:
        del sys.modules[name]
    for name in order:
        importlib.import_module(f"chopgrad_align{name}")
    from chopgrad_align import decode, rollout
    assert isinstance(decode, types.FunctionType) and isinstance(rollout, types.FunctionType), order
""",
        tmp_path,
    )


def test_every_public_name_says_what_it_is():
    for name in chopgrad_align.__all__:
        thing = getattr(chopgrad_align, name)
        assert thing.__doc__, name
        assert not thing.__doc__.startswith(f"{name}("), name  # what a dataclass gets that has none
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            assert member.startswith("_") or not inspect.isfunction(value) or value.__doc__, f"{name}.{member}"
    for module, path in MODULES.items():
        source = path.read_text(encoding="utf-8")
        assert not source.strip() or ast.get_docstring(ast.parse(source)), module


# --- what it brings along ---------------------------------------------------------------------------------------------


# What `DiffusionPipeline.from_pretrained` and open_clip read, and what configs, reward and card name.
EMBEDDED = {
    "README.md",
    "figures.json",
    "prompts_held_out.txt",
    "prompts_train.txt",
    "pipeline/call_defaults.json",
    "pipeline/model_index.json",
    "pipeline/scheduler/scheduler_config.json",
    "pipeline/text_encoder/config.json",
    "pipeline/text_encoder/model.safetensors",
    "pipeline/tokenizer/tokenizer.json",
    "pipeline/tokenizer/tokenizer_config.json",
    "pipeline/transformer/config.json",
    "pipeline/transformer/diffusion_pytorch_model.safetensors",
    "pipeline/vae/config.json",
    "pipeline/vae/diffusion_pytorch_model.safetensors",
    "reward/open_clip_config.json",
    "reward/open_clip_model.safetensors",
    "reward/tokenizer.json",
    "reward/tokenizer_config.json",
    "video_reward/config.json",
    "video_reward/model.safetensors",
    "video_reward/tokenizer.json",
    "video_reward/tokenizer_config.json",
}


def _files_in(folder) -> set[str]:
    """Paths below a folder of the tree or of a package."""
    below = {f"{entry.name}/{name}" for entry in folder.iterdir() if entry.is_dir() for name in _files_in(entry)}
    return below | {entry.name for entry in folder.iterdir() if entry.is_file()}


def test_configs_and_embedded_files_are_found_in_the_package():
    configs = {name for name in _files_in(ROOT / "configs") if name.endswith(".yaml")}
    assert configs
    assert configs <= _files_in(files("chopgrad_configs"))
    embedded = files("chopgrad_align") / "embedded"
    assert _files_in(embedded) >= EMBEDDED
    assert all((embedded / name).stat().st_size > 0 for name in EMBEDDED)
    assert _files_in(ROOT / "chopgrad_align" / "embedded") <= _files_in(embedded)


OURS = [entry for entry in entry_points(group="chopgrad_align.rewards") if entry.dist.name == "chopgrad-align"]


def test_every_reward_of_the_folder_is_published():
    published = {entry.module for entry in OURS}
    shared = (
        "checkpoints",
        "detection",
        "image_features",
        "optical_flow",
        "precision",
        "preprocess",
        "prompt_cache",
        "prompt_length",
    )
    shared += ("qwen_vision", "whole_video")
    helpers = {"chopgrad_rewards", *(f"chopgrad_rewards.{name}" for name in shared)}
    assert published == {module for module in MODULES if module.split(".")[0] == "chopgrad_rewards"} - helpers


@pytest.mark.parametrize("entry", OURS, ids=lambda entry: entry.name)
def test_published_names_lead_to_a_class(entry):
    spec = importlib.util.find_spec(entry.module)  # not imported: that would load the model libraries
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    assert entry.attr in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}

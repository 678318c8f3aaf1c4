"""Pages of the documentation that follow the code. That the site builds without a warning is `.ci/run`'s to see."""

import ast
import importlib.util
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import yaml

import chopgrad_align
from chopgrad_align.training import config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def _hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_config_keys_are_all_on_their_page():
    page = _hooks().config_keys()
    sections = [kind for kind in vars(config).values() if is_dataclass(kind) and kind.__module__ == config.__name__]
    assert len(sections) > 15
    for kind in sections:
        for field in fields(kind):
            assert f"| `{field.name}` |" in page, f"{kind.__name__}.{field.name}"
    assert "| `folder` | <code>Name</code> |  | The folder of all that the run writes" in page
    assert "## rewards.NAME\n" in page


def test_public_names_are_all_on_the_page_of_python():
    named = re.findall(r"^::: chopgrad_align\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(set(chopgrad_align.__all__) - {"__version__"})


def test_messages_that_are_explained_are_those_of_the_code():
    texts = []
    for path in [*(ROOT / "chopgrad_align").rglob("*.py"), *(ROOT / "rewards").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts += [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    parts = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(parts) > 15
    assert [part for part in parts if not any(part in text for text in texts)] == ["CUDA out of memory"]


def test_pages_are_all_in_the_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(re.findall(r"[\w/]+\.md", str(site["nav"])))
    assert listed == {path.name for path in DOCS.glob("*.md")} | {"config_keys.md"}


def test_versions_agree():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == chopgrad_align.__version__

"""Hooks of the documentation site: the page of config keys, and links out of `docs/`, which the site does not have."""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files


_CONFIG = Path(__file__).parents[1] / "chopgrad_align" / "training" / "config.py"


def on_files(files: Files, config: Any) -> Files:
    """Add the page of config keys."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "config_keys.md", content=config_keys()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Leave out the targets of links to files beside `docs/`."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)


def config_keys() -> str:
    """Write the page of all keys, with types, defaults and meanings, from the dataclasses of the config."""
    classes = {node.name: node for node in ast.parse(_CONFIG.read_text("utf-8")).body if isinstance(node, ast.ClassDef)}
    parts = [
        "# Config keys",
        "Made from `chopgrad_align/training/config.py`. A key that has no default must be given. `chopgrad-align align "
        "--print-config` shows a config with all values; [Configs](configs.md) lists those that come with the package.",
    ]
    for name, path in _sections(classes, "Config", ()):
        about = ast.get_docstring(classes[name])
        rows = [f"| `{key}` | {_code(kind)} | {_code(default)} | {_cell(text)} |"
                for key, kind, default, text in _fields(classes[name])]  # fmt: skip
        parts += [f"## {'.'.join(path) or 'The sections'}", *([about] if about else [])]
        parts.append("\n".join(["| key | type | default | |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _sections(classes: dict[str, ast.ClassDef], name: str, path: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """Each class that a key leads to, with its path; the keys of a mapping are NAME."""
    found = [(name, path)]
    for key, kind, _, _ in _fields(classes[name]):
        for inner in re.findall(r"\w+", kind):
            if inner in classes:
                found += _sections(classes, inner, (*path, key, *(["NAME"] if kind.startswith("dict[") else [])))
    return found


def _fields(node: ast.ClassDef) -> list[tuple[str, str, str, str]]:
    """Key, type, default and meaning of each field of a class."""
    found = []
    for part, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and not part.target.id.startswith("_"):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            text = " ".join(str(after.value.value).split()) if is_text else ""  # type: ignore[union-attr]
            found.append((part.target.id, ast.unparse(part.annotation), _default(part.value), text))
    return found


def _default(value: ast.expr | None) -> str:
    if value is None:
        return ""
    text = ast.unparse(value)
    if match := re.fullmatch(r"field\(default_factory=(?:lambda: )?(.*)\)", text):
        return {"dict": "{}", "list": "[]"}.get(match[1], "" if match[1].isidentifier() else match[1])
    return text


def _code(text: str) -> str:
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")

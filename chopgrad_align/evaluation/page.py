"""Pages that can be opened from the disk, mailed and archived: everything is in the one file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2

from ..common.files import whole_file


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill one of the templates beside this file, which extend `page.html`; the page's title is its folder's name.

    Raises:
        UsageError: It cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    html = environment.get_template(template).render(title=path.parent.resolve().name, **values)
    with whole_file(path) as partial:
        partial.write_text(html, encoding="utf-8")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

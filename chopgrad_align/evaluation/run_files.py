"""Files of a run folder, read for people: each may be missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..common.errors import UsageError


def read_json(path: Path, kind: Any) -> Any:
    """The file's content, None if there is none.

    Raises:
        UsageError: It is not JSON, or not of that kind.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}); correct or delete it") from error
    if not isinstance(content, kind):
        expected = kind.__name__ if isinstance(kind, type) else kind
        raise UsageError(f"expected a JSON {expected} in {path}, got {content!r:.40}; correct or delete it")
    return content

"""Captions in files beside the clips: `fox.txt`, `fox.caption` or `fox.json` beside `fox.mp4`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..common.errors import UsageError, located
from .table_file import CAPTION_NAMES, column_of, decoded, text_cell

BESIDE = (".txt", ".caption", ".json")
"""Suffixes of files with a caption."""

_SIBLINGS = ("labels", "captions", "prompts")  # folders beside `videos/`, as in CogVideo's own data


def caption_of(texts: Mapping[str, bytes], name: str) -> str:
    """The caption of a clip.

    Args:
        texts: The content of each file that it has, by its suffix: `.txt` and `.caption` are text, `.json` an object
            with a key `caption`, `text` or `prompt`.
        name: Of the clip, in messages.

    Returns:
        Empty if there is none.

    Raises:
        UsageError: A file that cannot be read, or two that say different things.
    """
    found: dict[str, str] = {}
    for suffix, content in texts.items():
        with located(f"the caption of {name} ({suffix})"):
            text = decoded(content)
            found[suffix] = text_cell(_of_json(text) if suffix == ".json" else text)
    said = {text for text in found.values() if text}
    if len(said) > 1:
        raise UsageError(f"{name} has different captions in {' and '.join(found)}; remove one of them")
    return next(iter(said), "")


def files_beside(clip: Path) -> dict[str, Path]:
    """The files with a caption that belong to a file, or to a folder of frames, by their suffixes."""
    stem = clip.name if clip.is_dir() else clip.stem
    folders = [clip.parent]
    if clip.parent.name == "videos":
        folders += [clip.parent.parent / name for name in _SIBLINGS]
    paths = (folder / f"{stem}{suffix}" for suffix in BESIDE for folder in folders)
    found: dict[str, Path] = {}
    for path in paths:
        if path.is_file():
            found.setdefault(path.suffix, path)
    return found


def _of_json(text: str) -> object:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON ({error})") from None
    if not isinstance(content, dict):  # of something else, such as key points
        return None
    column = column_of("caption", CAPTION_NAMES, list(content), "it")
    return content[column] if column else None

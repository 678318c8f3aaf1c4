"""Folders and a hub cache that stand in for what a run loads: configurations without weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
import yaml

_EMBEDDINGS = "embeddings.json"
_OF_TRANSFORMERS = ("text_encoder", "text_encoder_2", "image_encoder")
_FILES = {
    "scheduler": "scheduler_config.json",
    "guider": "guider_config.json",
    "image_processor": "preprocessor_config.json",
    "feature_extractor": "preprocessor_config.json",
}
"""Of the components whose configuration is not in `config.json`."""


@cache
def _data(name: str) -> Any:
    return yaml.safe_load((files(__package__) / name).read_text(encoding="utf-8"))


def known_models() -> dict[str, Any]:
    """The descriptions of the models that come with the planner, by hub id."""
    models = _data("models.yaml")["models"]
    return {alias: model for name, model in models.items() for alias in (name, *model.get("aliases", ()))}


def write_pipeline(model: dict[str, Any], folder: Path) -> None:
    """Fill a folder as `save_pretrained` of the pipeline would, without weights."""
    index: dict[str, Any] = {"_class_name": model["pipeline"], **model.get("settings", {})}
    for name, settings in model["components"].items():
        config = dict(settings)
        cls = config.pop("class")
        library, file = _kind(name, cls)
        library = config.pop("library", library)  # of diffusers, a pipeline's own
        index[name] = [library, cls]
        config |= {"architectures": [cls]} if library == "transformers" else {"_class_name": cls}
        _write_json(folder / name / file, config)
    for tokenizer in ("tokenizer", "tokenizer_2"):
        if tokenizer.replace("tokenizer", "text_encoder") in model["components"]:
            index[tokenizer] = ["transformers", "PreTrainedTokenizerFast"]
            _write_tokenizer(folder / tokenizer)
    _write_json(folder / "model_index.json", index)
    _write_json(folder / _EMBEDDINGS, model.get("embeddings", {}))


def embeddings(folder: Path) -> dict[str, list[int]]:
    """The shapes of a stand-in's prompt embeddings, as far as its description has them."""
    file = folder / _EMBEDDINGS
    return json.loads(file.read_text()) if file.is_file() else {}


def _kind(name: str, cls: str) -> tuple[str, str]:
    """A component's library, and the file of its configuration."""
    file = _FILES.get(name, "config.json")
    of_transformers = name in _OF_TRANSFORMERS or file == "preprocessor_config.json"
    return "transformers" if of_transformers else "diffusers", file


class NoSafetyChecker:
    """Lets all texts pass: the safety checker of Cosmos is a package of its own, which a run needs and a count not."""

    def to(self, *args: Any, **kwargs: Any) -> NoSafetyChecker:
        return self

    def check_text_safety(self, text: str) -> bool:
        return True


@contextmanager
def without_safety_checkers(folder: Path) -> Iterator[None]:
    """Within the context, the folder's pipeline is loaded without the safety checker of Cosmos."""
    index = folder / "model_index.json"
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name") if index.is_file() else None
    module = sys.modules.get(getattr(getattr(diffusers, str(name), None), "__module__", ""))
    if hasattr(module, "CosmosSafetyChecker"):
        with mock.patch.object(module, "CosmosSafetyChecker", NoSafetyChecker):
            yield
    else:
        yield


def write_hub(folder: Path) -> None:
    """Fill a folder as the hub's cache, and `torch.hub`'s beside it, with what the published rewards load."""
    for source, content in _data("checkpoints.yaml").items():
        if source.startswith("https://"):
            snapshot = folder / "checkpoints"
        else:
            name, _, revision = source.partition("@")
            repository = folder / f"models--{name.replace('/', '--')}"
            snapshot = repository / "snapshots" / revision
            (repository / "refs").mkdir(parents=True)
            (repository / "refs" / "main").write_text(revision)
        snapshot.mkdir(parents=True)
        if "config" in content:
            _write_json(snapshot / "config.json", content["config"])
        if "tokenizer" in content:
            _write_tokenizer(snapshot)
        for file, shapes in content.get("weights", {}).items():
            torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, snapshot / file)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _write_tokenizer(folder: Path) -> None:
    from ..data.tokenizer import text_tokenizer

    text_tokenizer(["word"]).save_pretrained(folder)

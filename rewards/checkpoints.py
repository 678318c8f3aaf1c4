"""Finding checkpoints, on this machine or on the hub, and reading them."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote

import torch
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import AutoConfig

from chopgrad_align.common.weight_files import fill_weights, load_weights, loading, read_weights

__all__ = ["HUB_ID", "at", "fill_weights", "load_pretrained", "load_weights", "loading", "locate", "read_weights"]

Model = TypeVar("Model", bound=nn.Module)

HUB_ID = r"[\w-][\w.-]*/[\w.-]+"  # owner/name


def at(source: str) -> dict[str, str]:
    """Arguments of transformers' `from_pretrained` for a folder, or a hub id, `owner/name` or `owner/name@revision`."""
    if not Path(source).is_dir() and re.fullmatch(HUB_ID + "@.+", source):
        name, revision = source.split("@", 1)
        return {"pretrained_model_name_or_path": name, "revision": revision}
    return {"pretrained_model_name_or_path": source}


def locate(source: str, filename: str) -> Path:
    """A file: `source` itself, or `filename` in a local folder or hub repository (`owner/name`, `owner/name@revision`).

    An address (`https://…`) is downloaded once, to `torch.hub`'s folder.
    """
    if source.startswith("https://"):
        path = Path(torch.hub.get_dir(), "checkpoints", unquote(PurePosixPath(source).name))
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(source, str(path), progress=False)
        return path
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / filename
    if path.is_file():
        return path
    looks_local = path.suffix in (".pt", ".pth", ".bin", ".safetensors")
    hub = at(source)
    if looks_local or not re.fullmatch(HUB_ID, hub["pretrained_model_name_or_path"]):
        raise FileNotFoundError(f"no such file: {path}")
    return Path(hf_hub_download(hub["pretrained_model_name_or_path"], filename, revision=hub.get("revision")))


def load_pretrained(model_class: type[Model], source: str, dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    """A transformers model from a source as for `at`, with options of its class; a missing weight is an error."""
    loader: Any = model_class
    kind, wanted = AutoConfig.from_pretrained(**at(source)).model_type, loader.config_class.model_type
    if kind != wanted:
        raise ValueError(f"its model type is {kind!r}, not {wanted!r}")
    model, info = loader.from_pretrained(**at(source), dtype=dtype, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise ValueError(f"{len(info['missing_keys'])} weights are missing")
    return model

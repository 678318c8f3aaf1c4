"""A cache on disk of what is expensive to compute and always the same: latents of clips, embeddings of captions.

The key is the content and the settings by which it is encoded, not a file name: another prompt, another crop or another
checkpoint of the encoder is another entry, and nothing has to be invalidated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..common.files import whole_file
from ..common.stored_tensors import stored_tensors

_SAMPLED = 64  # values of each weight that tell one checkpoint from another


class Cache:
    """A folder of safetensors files, or without a folder: host memory.

    Files appear under their names when they are complete, so that several processes can fill one folder. A file that
    cannot be read is computed again.

    Attributes:
        hits: Entries that were read.
        misses: Entries that were computed, the damaged ones included.
        damaged: Files that could not be read.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._memory: dict[str, dict[str, Tensor]] = {}
        self.hits = self.misses = self.damaged = 0

    def get(
        self, content: Tensor | str, settings: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Read an entry, or compute and write it; tensors come on the CPU, detached.

        Args:
            content: What is encoded: a caption or a video.
            settings: All else that the result depends on, as JSON has it; `fingerprint` of the encoder among it.
            compute: Encodes it.

        Raises:
            UsageError: The folder cannot be written to.
        """
        name = _name(content, settings)
        if (tensors := self._read(name)) is not None:
            self.hits += 1
            return tensors
        self.misses += 1
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
        if self.folder is None:
            self._memory[name] = tensors
        else:
            with whole_file(self._path(self.folder, name)) as partial:
                partial.write_bytes(safetensors.torch.save(tensors))
        return tensors

    def _read(self, name: str) -> dict[str, Tensor] | None:
        if self.folder is None:
            return self._memory.get(name)
        try:
            return safetensors.torch.load_file(self._path(self.folder, name))
        except FileNotFoundError:
            return None
        except SafetensorError:
            self.damaged += 1
            return None

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        return folder / name[:2] / f"{name}.safetensors"  # folders of thousands of files are slow


def _name(content: Tensor | str, settings: Mapping[str, Any]) -> str:
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + b"\0")
    if isinstance(content, str):
        key.update(content.encode())
    else:
        key.update(f"{content.dtype} {tuple(content.shape)} ".encode())
        key.update(content.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return key.hexdigest()


def latents(cache: Cache | None, vae: Any, video: Tensor) -> Tensor:
    """A clip's latents: the mode of the VAE's posterior, not scaled or shifted.

    Args:
        cache: Kept in it, by the pixels and the VAE; None: nothing is kept.
        vae: Of diffusers, for videos: `encode` takes `(B, 3, F, H, W)` in [-1, 1].
        video: `(F, 3, H, W)` in [0, 1].

    Returns:
        `(C, f, h, w)` in the VAE's type and on its device, without a graph.
    """
    weight = next(vae.parameters())

    def compute() -> dict[str, Tensor]:
        pixels = (2 * video - 1).transpose(0, 1)[None].to(weight.device, weight.dtype)
        with torch.no_grad():
            return {"latents": vae.encode(pixels).latent_dist.mode()[0]}

    found = compute() if cache is None else cache.get(video, {"vae": fingerprint(vae)}, compute)
    return found["latents"].to(weight.device)


def fingerprint(module: nn.Module) -> str:
    """Tells checkpoints of a model apart: a hash of its class and of each weight's name, type, shape and a few values.

    Training changes nearly every value of a weight, so a few are enough, and the size of the model does not matter.
    """
    key = hashlib.sha256(type(module).__name__.encode())
    stored = ((name, part) for name, weight in module.state_dict().items() for part in stored_tensors(weight))
    for name, weight in stored:
        count = min(_SAMPLED, weight.numel())
        places = torch.arange(count, device=weight.device) * weight.numel() // max(count, 1)
        values = weight.detach().flatten()[places].double().cpu()
        key.update(f"{name} {weight.dtype} {tuple(weight.shape)} {values.tolist()}".encode())
    return key.hexdigest()

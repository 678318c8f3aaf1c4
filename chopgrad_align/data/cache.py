"""What is expensive to compute and always the same, kept on disk: latents of clips, embeddings of captions.

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

from ..files import whole_file

_SAMPLED = 64  # values of each weight that tell one checkpoint from another


class Cache:
    """A folder of safetensors files.

    Files appear under their names when they are complete, so that several processes can fill one folder. A file that
    cannot be read is computed again.

    Attributes:
        hits: Entries that were read.
        misses: Entries that were computed, the damaged ones included.
        damaged: Files that could not be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
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
        path = self._path(content, settings)
        try:
            tensors = safetensors.torch.load_file(path)
            self.hits += 1
            return tensors
        except FileNotFoundError:
            pass
        except SafetensorError:
            self.damaged += 1
        self.misses += 1
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
        with whole_file(path) as partial:
            partial.write_bytes(safetensors.torch.save(tensors))
        return tensors

    def _path(self, content: Tensor | str, settings: Mapping[str, Any]) -> Path:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + b"\0")
        if isinstance(content, str):
            key.update(content.encode())
        else:
            key.update(f"{content.dtype} {tuple(content.shape)} ".encode())
            key.update(content.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        name = key.hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"  # folders of thousands of files are slow


def latents(cache: Cache, vae: Any, video: Tensor) -> Tensor:
    """A clip's latents: the mode of the VAE's posterior, not scaled or shifted.

    Args:
        cache: Kept in it, by the pixels and the VAE.
        vae: Of diffusers, for videos: `encode` takes `(B, 3, F, H, W)` in [-1, 1].
        video: `(F, 3, H, W)` in [0, 1].

    Returns:
        `(C, f, h, w)` on the CPU, in the VAE's type.
    """

    def compute() -> dict[str, Tensor]:
        weight = next(vae.parameters())
        pixels = (2 * video - 1).transpose(0, 1)[None].to(weight.device, weight.dtype)
        with torch.no_grad():  # what is written to disk carries no graph
            return {"latents": vae.encode(pixels).latent_dist.mode()[0]}

    return cache.get(video, {"vae": fingerprint(vae)}, compute)["latents"]


def prompt_embeddings(cache: Cache, pipe: Any, prompt: str, **arguments: Any) -> list[Tensor | None]:
    """What `pipe.encode_prompt` returns for a prompt: tensors and Nones, in its order.

    Args:
        cache: Kept in it, by the prompt, the arguments and the text encoders.
        pipe: Of diffusers, with an `encode_prompt` that takes a prompt.
        prompt: One.
        arguments: For `encode_prompt`, as JSON has them, such as `max_sequence_length`.
    """
    modules = {
        name: part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None
    }
    settings = {
        "encoders": {name: fingerprint(module) for name, module in modules.items()},
        "pipeline": type(pipe).__name__,
        "arguments": arguments,
    }

    def compute() -> dict[str, Tensor]:
        with torch.no_grad():  # as above
            returned = pipe.encode_prompt(prompt, **arguments)
        returned = returned if isinstance(returned, tuple) else (returned,)
        # A place without a tensor is an empty one, which no embedding is.
        return {f"{i:02d}": torch.empty(0) if tensor is None else tensor for i, tensor in enumerate(returned)}

    stored = cache.get(prompt, settings, compute)
    return [tensor if tensor.numel() else None for _, tensor in sorted(stored.items())]


def fingerprint(module: nn.Module) -> str:
    """Tells checkpoints of a model apart: a hash of its class and of each weight's name, type, shape and a few values.

    Training changes nearly every value of a weight, so a few are enough, and the size of the model does not matter.
    """
    key = hashlib.sha256(type(module).__name__.encode())
    for name, weight in module.state_dict().items():
        count = min(_SAMPLED, weight.numel())
        places = torch.arange(count, device=weight.device) * weight.numel() // max(count, 1)
        values = weight.detach().flatten()[places].double().cpu()
        key.update(f"{name} {weight.dtype} {tuple(weight.shape)} {values.tolist()}".encode())
    return key.hexdigest()

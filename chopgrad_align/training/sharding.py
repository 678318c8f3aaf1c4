"""Sharding of frozen denoisers: each of several processes keeps a part of every weight (FSDP2).

The trained weights are added afterwards, and stay whole in every process, as if nothing was sharded.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..sampling.denoisers import blocks_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_NAME = "diffusion_pytorch_model"


def shard(denoiser: nn.Module, mesh: DeviceMesh) -> None:
    """Freeze a denoiser, and leave a part of each weight in each process of a mesh.

    A block's weights are gathered when it runs, forwards, recomputed and backwards, and let go after it. Those outside
    the blocks (embeddings, the last projection) are gathered at the first call and stay: a recomputed call of the
    whole denoiser finds them there.

    Args:
        denoiser: A block is an entry of one of its module lists.
        mesh: One dimension; all of its processes make the same calls of the denoiser.
    """
    from torch.distributed.fsdp import fully_shard

    # It is about a hook in the backward pass of the whole denoiser, which has nothing left to do.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    denoiser.requires_grad_(False)
    for block in blocks_of(denoiser):
        fully_shard(block, mesh=mesh)
    root = fully_shard(denoiser, mesh=mesh, reshard_after_forward=False)
    root.set_reshard_after_backward(False, recurse=False)


@contextmanager
def shapes_of_the_whole(pipe: Any) -> Iterator[None]:
    """Within the context, sharded weights look whole, and have no values.

    A LoRA is added in it: peft takes a sharded weight for a part of a tensor-parallel layer.
    """
    from torch.distributed.tensor import DTensor

    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    sharded: list[tuple[nn.Module, str, Any]] = [
        (module, name, weight)
        for part in parts
        for module in part.modules()
        for name, weight in module._parameters.items()
        if isinstance(weight, DTensor)
    ]
    for module, name, weight in sharded:
        hollow = weight.to_local().new_zeros(()).expand(weight.shape)
        module._parameters[name] = nn.Parameter(hollow, requires_grad=False)
    try:
        yield
    finally:
        for module, name, weight in sharded:
            module._parameters[name] = weight


def read_sharded(kind: type, folder: Path, dtype: torch.dtype, mesh: DeviceMesh, variant: str | None = None) -> Any:
    """Load a denoiser of which this process never holds, or reads, more than its part.

    Args:
        kind: Its class in diffusers.
        folder: With its configuration and its weights in safetensors files.
        dtype: Of the weights, but for those that its class keeps in float32.
        mesh: As for `shard`.
        variant: Of the weight files, such as fp16.

    Raises:
        OSError: A file is not there.
        RuntimeError: Weights that are others than the class has.
    """
    from accelerate import init_empty_weights

    model: Any = kind
    with init_empty_weights(include_buffers=False):
        denoiser = model.from_config(model.load_config(folder))
    precise = set(denoiser._keep_in_fp32_modules or ())
    for name, weight in denoiser.named_parameters():
        weight.data = weight.data.to(torch.float32 if precise & {*name.split(".")} else dtype)
    shard(denoiser, mesh)
    files: dict[str, Any] = dict(_files(folder, variant))
    denoiser._fix_state_dict_keys_on_load(files)
    wanted = denoiser.state_dict()
    parts = {key: _part(file, stored, wanted[key], mesh) for key, (file, stored) in files.items() if key in wanted}
    denoiser.load_state_dict(parts, assign=True)
    return denoiser.requires_grad_(False).eval()


def _files(folder: Path, variant: str | None) -> Mapping[str, tuple[Path, str]]:
    """Where each weight is: the file, and the name that it has there."""
    from safetensors import safe_open

    index = folder / f"{_NAME}.safetensors.index{f'.{variant}' if variant else ''}.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {key: (folder / name, key) for key, name in names.items()}
    file = folder / f"{_NAME}{f'.{variant}' if variant else ''}.safetensors"
    with safe_open(file, "pt") as opened:
        return {key: (file, key) for key in opened.keys()}  # noqa: SIM118 (no mapping)


def _part(file: Path, key: str, like: Tensor, mesh: DeviceMesh) -> Tensor:
    """This process's rows of a stored weight, as `torch.chunk` deals them out; a buffer is whole in each."""
    from safetensors import safe_open
    from torch.distributed.tensor import DTensor

    with safe_open(file, "pt") as opened:
        if not isinstance(like, DTensor):
            return opened.get_tensor(key).to(like.dtype)
        stored = opened.get_slice(key)
        rows = -(-like.shape[0] // mesh.size())
        start = rows * mesh.get_local_rank()
        part = stored[start : start + rows] if start < like.shape[0] else stored[:0]
    part = part.to(mesh.device_type, like.dtype, copy=True)  # not a view into the file
    return DTensor.from_local(part, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())

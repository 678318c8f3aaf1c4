"""Context parallelism of denoisers: several processes work on the tokens of one clip, each on an equal share.

Between the first block and the last, a token meets others in self-attention alone. There each process has all tokens of
a share of the heads (Ulysses, arXiv 2309.14509), which diffusers does. A process backpropagates the outputs of its own
tokens, so that its gradient of a weight is a part, and the sum over the processes is that of one process.
"""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from ..common.errors import UsageError
from ..sampling.denoisers import denoisers_of
from ..sampling.row_arguments import shape_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# Those that split their tokens once and gather them once. Others gather and split in every block (Helios), where the
# parts of a gradient are not disjoint, or have two kinds of tokens, of which one is whole everywhere (LTX-2).
_SPLITTABLE = ("WanTransformer3DModel", "LTXVideoTransformer3DModel")


def expect_splittable(pipe: Any, calls: Iterable[Mapping[str, Any]], processes: int) -> None:
    """Raise a UsageError if so many processes cannot share the tokens of a pipeline's calls, as far as these tell."""
    for name, denoiser in denoisers_of(pipe).items():
        kind = _class_name(denoiser)
        if kind not in _SPLITTABLE:
            raise UsageError(
                f"parallel.context={processes}: pipe.{name} is a {kind}, whose tokens cannot be split with an exact "
                f"gradient; those of {', '.join(_SPLITTABLE)} can; set parallel.context=1"
            )
        heads = denoiser.config.num_attention_heads
        if heads % processes:
            raise UsageError(
                f"parallel.context={processes}: expected a divisor of the {heads} attention heads of pipe.{name}"
            )
        for call in calls:
            shape = shape_of(inspect.signature(type(pipe).__call__).parameters, call)
            temporal, spatial = _compression(pipe)
            if shape.frames and shape.height and shape.width:
                latent = ((shape.frames - 1) // temporal + 1, shape.height // spatial, shape.width // spatial)
                clip = f"{shape.frames} frames of {shape.height}x{shape.width}"
                _expect_equal_shares(denoiser, latent, processes, clip)


def split_tokens(pipe: Any, mesh: DeviceMesh) -> None:
    """Let the processes of a mesh share the tokens of each call of a pipeline's denoisers.

    They make the same calls, and each gets what one process would. Each has the whole gradient of the latents, and of a
    weight a part.

    Args:
        pipe: See `expect_splittable`.
        mesh: With the dimensions `ring`, of size 1, and `ulysses`.
    """
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ContextParallelInput, ParallelConfig

    # It says of each argument that a plan splits where it has a value for each token, that here it has one for all.
    logging.getLogger("diffusers.hooks.context_parallel").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*_functional_collectives.all_gather_tensor. is deprecated", FutureWarning)
    size = mesh["ulysses"].size()
    context = ContextParallelConfig(ulysses_degree=size, mesh=mesh)
    parallel = ParallelConfig(context_parallel_config=context)
    # Not by the model's `enable_parallelism`, which asks torch for an accelerator.
    parallel.setup(torch.distributed.get_rank(), size, torch.device(mesh.device_type), mesh=mesh)
    for denoiser in denoisers_of(pipe).values():
        # Text is whole in each process: the backward pass of diffusers' Ulysses takes queries and keys for equally
        # many. And a time is of all tokens or of each, where some of them are those of an image.
        plan = {module: _without_text(split) for module, split in denoiser._cp_plan.items()}
        plan[""] = {**plan.get("", {}), "timestep": ContextParallelInput(split_dim=1, expected_dims=2)}
        apply_context_parallel(denoiser, context, plan)
        for name, module in denoiser.named_modules():
            if hasattr(getattr(module, "processor", None), "_parallel_config") and not name.endswith("attn2"):
                module.processor._parallel_config = parallel
        _sum_gradients_of_inputs(denoiser, mesh["ulysses"].get_group())


def _without_text(split: Any) -> Any:
    return {key: how for key, how in split.items() if "encoder" not in str(key)} if isinstance(split, dict) else split


def _sum_gradients_of_inputs(denoiser: nn.Module, group: ProcessGroup) -> None:
    """Before each call, look whether its tokens can be shared; after each backward pass, make gradients whole."""

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        latent = latents.shape[2:] if latents.ndim == 5 else latents.shape[1:2]
        _expect_equal_shares(module, latent, group.size(), f"latents of {'x'.join(map(str, latents.shape))}")

        def whole(tensor: Tensor) -> Tensor:
            return _Shared.apply(tensor, group) if tensor.requires_grad else tensor

        return tree_map_only(Tensor, whole, (args, kwargs))

    denoiser.register_forward_pre_hook(before, with_kwargs=True)


class _Shared(torch.autograd.Function):
    """A tensor that is the same in all processes, each of which has a part of its gradient: they get the sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, part: Tensor) -> tuple[Tensor, None]:
        gradient = part.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


def _expect_equal_shares(denoiser: Any, latent: Sequence[int], processes: int, clip: str) -> None:
    """Raise a UsageError unless the tokens of a clip can be shared out equally.

    Args:
        denoiser: Makes a token of a patch.
        latent: Latent frames, rows and columns; or the number of patches, where the pipeline makes them.
        processes: How many share them.
        clip: What they are of, in words.
    """
    config = denoiser.config
    patch = config.patch_size if isinstance(config.patch_size, int) else math.prod(config.patch_size)
    tokens = math.prod(latent) // patch
    if tokens % processes:
        raise UsageError(
            f"parallel.context={processes}: {clip} are {tokens} tokens of {_class_name(denoiser)}, of which "
            f"{processes} processes cannot have equally many; choose another size of the videos, or fewer processes"
        )


def _compression(pipe: Any) -> tuple[int, int]:
    """Frames and pixels of a side for one latent."""
    if hasattr(pipe, "vae_scale_factor_temporal"):
        return pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
    return pipe.vae_temporal_compression_ratio, pipe.vae_spatial_compression_ratio


def _class_name(denoiser: nn.Module) -> str:
    """The class of a denoiser, which is another one where it is sharded."""
    return type(denoiser).__name__.removeprefix("FSDP")

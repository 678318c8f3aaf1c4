"""Load models without weights: of their real classes and shapes, as fake tensors, which have no data."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only

from ..objective.objective import Objective
from ..training.quantization import KINDS, Quantization
from .quantized import quantize_stand_ins


@contextmanager
def weightless(mode: FakeTensorMode, hub: Path) -> Iterator[None]:
    """Within the context, the loaders of diffusers, transformers, open_clip and torchvision read no weights.

    They are replaced and not circumvented, so that the code that loads a run's pipeline and rewards is the run's own.

    Args:
        mode: Of the fake tensors.
        hub: A folder that takes the place of the hub, of its cache and of `torch.hub`'s.
    """
    import open_clip
    from diffusers import ModelMixin
    from huggingface_hub import constants
    from torchvision.models import WeightsEnum
    from transformers import PreTrainedModel

    with ExitStack() as stack:
        for owner, name, value in (
            (ModelMixin, "from_pretrained", classmethod(functools.partial(_of_diffusers, mode))),
            (PreTrainedModel, "from_pretrained", classmethod(functools.partial(_of_transformers, mode))),
            (open_clip, "create_model", functools.partial(_of_open_clip, mode, open_clip.create_model)),
            (WeightsEnum, "get_state_dict", _of_torchvision),
            (nn.Module, "_apply", _apply),
            *((type(kind), "settings", _settings) for kind in KINDS.values()),
            *((type(kind), "loadable", lambda kind: nullcontext()) for kind in KINDS.values()),
            (constants, "HF_HUB_CACHE", str(hub)),
            (constants, "HF_HUB_OFFLINE", True),
            (torch.hub, "get_dir", lambda: str(hub)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _settings(kind: Quantization, library: Any, dtype: torch.dtype) -> dict[str, Any]:
    return {"quantize": kind}


def _of_diffusers(mode: FakeTensorMode, cls: Any, source: str, **settings: Any) -> Any:
    config = cls.load_config(source, subfolder=settings.get("subfolder"))
    dtype = settings.get("torch_dtype") or settings.get("dtype") or torch.float32
    with mode, _default_dtype(dtype):
        model = cls.from_config(config)
    for name, parameter in model.named_parameters():  # as the loader does
        if any(part in name.split(".") for part in cls._keep_in_fp32_modules or ()):
            parameter.data = parameter.data.float()
    if kind := settings.get("quantize"):
        with mode:
            quantize_stand_ins(model, kind, {*(cls._keep_in_fp32_modules or ())})
    return model.eval()


def _of_transformers(mode: FakeTensorMode, cls: Any, pretrained_model_name_or_path: str, **settings: Any) -> Any:
    from transformers.initialization import no_init_weights

    place = {key: settings[key] for key in ("subfolder", "revision") if settings.get(key)}
    config = cls.config_class.from_pretrained(pretrained_model_name_or_path, **place)
    dtype = settings.get("dtype") or settings.get("torch_dtype") or torch.float32
    with mode, no_init_weights():  # whose random numbers some models look at
        model = cls._from_config(config, dtype=dtype).eval()
        model.tie_weights()
    if kind := settings.get("quantize"):
        with mode:
            quantize_stand_ins(model, kind, _kept_by_transformers(model, kind))
    return (model, {"missing_keys": set()}) if settings.get("output_loading_info") else model


def _kept_by_transformers(model: Any, kind: Quantization) -> set[str]:
    from transformers.quantizers.base import HfQuantizer

    precise = model._keep_in_fp32_modules if kind.keeps_float32_layers else None
    return {*HfQuantizer.get_modules_to_not_convert(model, None, precise)}


def _of_open_clip(mode: FakeTensorMode, create_model: Callable[..., Any], name: str, *_: Any, **settings: Any) -> Any:
    settings |= {"pretrained": None, "require_pretrained": False, "load_weights": False}
    with mode:
        return create_model(name, **settings)


def _of_torchvision(weights: Any, *_: Any, **__: Any) -> dict[str, Tensor]:
    from torchvision.models import get_model, get_model_weights, list_models

    name = next(name for name in list_models() if get_model_weights(name) is type(weights))
    with torch.device("meta"):
        shapes = get_model(name).state_dict()
    # Real, and never written, so that the memory is not touched.
    return {key: torch.empty_like(tensor, device="cpu") for key, tensor in shapes.items()}


def make_weightless(mode: FakeTensorMode, objective: Objective) -> None:
    """Make the weights fake that a reward or a loss made or read by itself, lest its network really run."""
    for term in objective.terms.values():
        part = getattr(term, term.kind, None)
        for module in part.modules() if isinstance(part, nn.Module) else ():
            for name, weight in module.named_parameters(recurse=False):
                if not isinstance(weight, FakeTensor):
                    fake = nn.Parameter(mode.from_tensor(weight.data), requires_grad=weight.requires_grad)
                    setattr(module, name, fake)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_apply_to_real = nn.Module._apply


def _apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` swaps weights for others, which fake ones refuse; their data can be set."""
    tensors = [*self.parameters(recurse), *self.buffers(recurse)]
    if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return _apply_to_real(self, function, recurse)
    for tensor in tensors:
        tensor.data = function(tensor.data)
    return self


_EMBEDDINGS = 2**20  # elements
_LARGE = 2**24


class Simulation(FakeTensorMode):
    """Fake tensors; but what is made of real tensors alone, or of integers, stays real, as do `torch.linspace`, a
    single random number, and zeros that are no more than a picture's embeddings; nothing that is large does.

    So the tables of a scheduler, time steps, guidance scales, tokens, their masks and absent conditions have values,
    which pipelines, models and rewards branch on; whatever a fake tensor takes part in is fake.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if FakeTensor not in types:
            given = any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
            number = func.overloadpacket is torch.ops.aten.rand and list(args[0]) == []
            dtype = (kwargs or {}).get("dtype")
            counted = dtype is not None and not (dtype.is_floating_point or dtype.is_complex)
            zeros = func.overloadpacket is torch.ops.aten.zeros and math.prod(args[0]) <= _EMBEDDINGS
            made = number or counted or zeros or func.overloadpacket is torch.ops.aten.linspace
            if made or (given and not self._makes_large(func, args, kwargs or {})):
                with unset_fake_temporarily():
                    return func(*args, **(kwargs or {}))
        elif func is torch.ops.aten.index.Tensor:
            args = (args[0], _positions(args[1]), *args[2:])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _makes_large(self, func: Any, args: Any, kwargs: Any) -> bool:
        """True if real tensors give one too large to be made, such as an attention's mask of all pairs of tokens."""
        sizes = [leaf.numel() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if math.prod(sizes) <= _LARGE or func._schema.is_mutable:
            return False
        with unset_fake_temporarily():
            shapes, named = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
            try:
                made = func(*shapes, **named)
            except (NotImplementedError, RuntimeError):  # it depends on values
                return False
        return sum(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)) > _LARGE


def _positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices in which real masks are the positions that they select, whose number a fake mask would not tell."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
            found.append(index)
        else:
            with unset_fake_temporarily():
                found += index.nonzero().unbind(1)
    return found


@contextmanager
def simulated(mode: Simulation, scheduler: Any) -> Iterator[None]:
    """Within the context new tensors are fake, except the tables of the scheduler, and of a copy of it."""
    original = type(scheduler).set_timesteps

    @functools.wraps(original)  # pipelines look at its arguments
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        with unset_fake_temporarily():
            original(*args, **kwargs)

    def deepcopied(self: Any, memo: dict[int, Any]) -> Any:
        made = memo[id(self)] = object.__new__(type(self))
        with unset_fake_temporarily():
            vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    with (
        mock.patch.object(type(scheduler), "set_timesteps", set_timesteps),
        mock.patch.object(type(scheduler), "__deepcopy__", deepcopied, create=True),
        mode,
    ):
        yield

"""Every prompt is encoded once, before training; then the text encoders, often the largest model, leave the device."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm

from ..common.errors import UsageError
from ..data.cache import Cache, fingerprint

_ALONE = "alone"  # the name of an embedding that is returned as it is, not in a tuple


def text_encoders(pipe: Any) -> dict[str, nn.Module]:
    """The components of a pipeline that `release_text_encoders` lets go."""
    return {
        name: part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None
    }


def release_text_encoders(pipe: Any) -> None:
    for name in text_encoders(pipe):
        setattr(pipe, name, None)


def encode_prompts(
    pipe: Any,
    arguments: Mapping[str, Any],
    texts: Iterable[Mapping[str, str]],
    cache: Cache,
    device: torch.device,
    others: Iterable[Mapping[str, Any]] = (),
    stacked: bool = True,
) -> bool:
    """Encode prompts as the pipeline's call would; from then on it takes them from the cache, and has no text encoder.

    How the call encodes is learnt from the call itself, which is begun with `arguments` and left as soon as it goes on
    to images or latents, whose models may not be on the device. Each prompt is encoded by itself, so that what it
    becomes does not depend on the others of its batch.

    Args:
        pipe: A diffusers pipeline, on the CPU; its text encoders are moved to the device for this.
        arguments: Of one call, with one prompt.
        texts: All that the pipeline will be called with: `prompt`, and other arguments that go with it.
        cache: Where the embeddings are kept.
        device: To encode on.
        others: Arguments of further calls, which may encode with other settings.
        stacked: Whether the pipeline will be called with several prompts at a time.

    Returns:
        False, and nothing has changed, if the pipeline takes no prompt, or encodes prompts with something else than
        text, such as an image.

    Raises:
        UsageError: The embeddings of two prompts are to be stacked, and of different lengths without a mask.
    """
    encodes = "prompt" in inspect.signature(getattr(pipe, "encode_prompt", lambda: None)).parameters
    if "prompt" not in arguments or not encodes or not text_encoders(pipe):
        return False
    for encoder in text_encoders(pipe).values():
        encoder.to(device)
    encoded = _EncodedPrompts(pipe, cache, device)
    calls: list[dict[str, Any]] = []
    for given in (arguments, *others):
        # Those of the prompt itself, and not, say, of the negative one in a call of its own.
        learnt = [call for call in encoded.learn(given) if call["prompt"] == given["prompt"]]
        if not learnt:
            return False
        calls += learnt
    shapes: dict[str, list[list[torch.Size]]] = {}
    other = distributed.is_initialized() and distributed.get_rank() > 0  # than the main process
    for text in tqdm([*texts], desc="encoding prompts", leave=False, disable=other):
        rows = [encoded.add({name: text.get(name, value) for name, value in call.items()}) for call in calls]
        prompt = text["prompt"]
        shapes[prompt] = [[tensor.shape for tensor in row.values()] for row in rows]
        first = next(iter(shapes))
        if stacked and shapes[prompt] != shapes[first] and not all(map(_has_mask, rows)):
            raise UsageError(
                f"{type(pipe).__name__} encodes {first!r} and {prompt!r} to different shapes, {shapes[first]} and "
                f"{shapes[prompt]}, which do not stack: set train.micro_batch=1 and validation.batch=1, or "
                "model.encode_prompts_once=false"
            )
    pipe.encode_prompt = encoded
    release_text_encoders(pipe)
    return True


class _NotEncoded(LookupError):
    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__(f"{arguments['prompt']!r} is not among the prompts that were encoded")
        self.arguments = arguments


class _NotText(Exception):
    pass


class _PromptsAreDone(Exception):
    pass


class _EncodedPrompts:
    """Takes the place of a pipeline's `encode_prompt`."""

    def __init__(self, pipe: Any, cache: Cache, device: torch.device) -> None:
        self._pipe, self._cache, self._device = pipe, cache, device
        self._encode, self._signature = pipe.encode_prompt, inspect.signature(pipe.encode_prompt)
        self._settings = {
            "pipeline": type(pipe).__name__,
            "encoders": {name: fingerprint(encoder) for name, encoder in text_encoders(pipe).items()},
        }
        self._known: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        if arguments["prompt"] is None and any(isinstance(value, Tensor) for value in arguments.values()):
            # The caller has embeddings; HunyuanVideo 1.5 without them means an empty prompt.
            return self._encode(*args, **kwargs)
        device = arguments.pop("device", None) or self._pipe.device
        rows = [self._row(one) for one in _one_by_one(arguments)]
        together = {
            name: torch.cat(_padded([row[name] for row in rows])).to(device) if first.numel() else None
            for name, first in rows[0].items()
        }
        return together[_ALONE] if _ALONE in together else tuple(together.values())

    def add(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """Encode one prompt, and know it from now on."""
        self._known.add(_json(arguments))
        return self._row(arguments)

    def _row(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """The embeddings of a prompt, by their place in what is returned; an empty tensor stands for None."""
        if (key := _json(arguments)) not in self._known:
            raise _NotEncoded(arguments)
        return self._cache.get(key, self._settings, lambda: self._computed(arguments))

    def _computed(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        if not text_encoders(self._pipe):
            raise UsageError(f"{self._cache.folder}: the embedding of {arguments['prompt']!r} was lost; start again")
        with torch.no_grad():
            where = {"device": self._device} if "device" in self._signature.parameters else {}
            returned = self._encode(**arguments, **where)
        named = {_ALONE: returned} if isinstance(returned, Tensor) else {f"{i:02d}": r for i, r in enumerate(returned)}
        return {name: torch.empty(0) if tensor is None else tensor for name, tensor in named.items()}

    def learn(self, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The arguments of each time that a call encodes; none if they are not all text and numbers."""
        calls: list[dict[str, Any]] = []
        with mock.patch.object(self._pipe, "encode_prompt", self), _leaving_after_prompts(self._pipe):
            while True:
                try:
                    self._pipe(**arguments)
                except _NotEncoded as new:
                    self.add(new.arguments)
                    calls.append(new.arguments)
                except _NotText:
                    return []
                except _PromptsAreDone:
                    return calls


def _one_by_one(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments for each prompt of several: of lists that go with the prompts, the item that goes with this one."""
    prompts = arguments["prompt"]
    alone = {"batch_size": 1} if "batch_size" in arguments else {}
    if prompts is None or isinstance(prompts, str):
        for _ in range(arguments.get("batch_size", 1)):
            yield arguments | alone
        return
    for i in range(len(prompts)):
        yield {
            name: value[i] if isinstance(value, list) and len(value) == len(prompts) else value
            for name, value in arguments.items()
        } | alone


def _has_mask(row: Mapping[str, Tensor]) -> bool:
    """True if a mask of tokens, `(1, tokens)` of whole numbers, is among the embeddings of a prompt."""
    return any(tensor.ndim == 2 and not tensor.is_floating_point() for tensor in row.values())


def _padded(tensors: list[Tensor]) -> list[Tensor]:
    """Embeddings `(1, tokens, …)` of the same number of tokens, the missing ones zero; so are they in a mask."""
    if len({tensor.shape for tensor in tensors}) == 1:
        return tensors
    longest = max(tensor.shape[1] for tensor in tensors)
    return [
        torch.cat([tensor, tensor.new_zeros(1, longest - tensor.shape[1], *tensor.shape[2:])], 1) for tensor in tensors
    ]


def _json(arguments: Mapping[str, Any]) -> str:
    return json.dumps(arguments, sort_keys=True, default=_name_of_dtype)


def _name_of_dtype(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value)
    raise _NotText


@contextmanager
def _leaving_after_prompts(pipe: Any) -> Iterator[None]:
    """Within the context, a call ends before any other model runs, which waits on the CPU."""

    def leave(*args: Any, **kwargs: Any) -> None:
        raise _PromptsAreDone

    with ExitStack() as stack:
        of_text = text_encoders(pipe)
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module) and name not in of_text:
                stack.callback(part.register_forward_pre_hook(leave).remove)
        for owner, method in ((pipe, "prepare_latents"), (pipe.vae, "encode")):
            if hasattr(owner, method):
                stack.enter_context(mock.patch.object(owner, method, leave))
        yield

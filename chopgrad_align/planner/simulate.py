"""The memory of one training step: the trainer's own code, run once, with every storage counted."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ..common.errors import UsageError
from ..common.storage_count import StorageCount
from ..common.stored_tensors import stored_tensors
from ..data.buckets import Bucket
from ..decoding.backprop import Backprop
from ..decoding.selected_frames import decode_selected_frames
from ..objective.losses.protocol import FrameLoss
from ..objective.objective import Objective
from ..objective.reward import FrameReward
from ..objective.statistics import Statistics
from ..sampling.call_shape import as_taken
from ..training.average import Average
from ..training.build import Models, load_models, make_method
from ..training.config import Clips, Config
from ..training.data import buckets
from ..training.encoded_prompts import release_text_encoders, text_encoders
from ..training.methods.protocol import MicroBatch
from ..training.methods.streaming import can_stream
from ..training.optimizers import make_optimizer
from .stand_ins import embeddings, known_models, without_safety_checkers, write_hub, write_pipeline
from .weightless import Simulation, make_weightless, simulated, weightless

_SECTIONS = {"reward": "rewards", "loss": "losses"}
"""Section of a config, by the kind of a term."""


_FOUND: dict[str, Any] = {"components": {}, "pipeline": None, "revision": None, "variant": None}
"""Where the parts of a model come from, if from one folder."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a phase: on the device with all that stays there, and of what waits in host memory."""

    device: int
    host: int


@dataclass(frozen=True)
class Figures:
    """Memory of one training step.

    Attributes:
        resident: Bytes that stay on the device, by what they are: the components of the pipeline with the LoRA, the
            rewards and losses, the clips of a micro-batch, the optimizer's state, and the weights' moving average.
        phases: The peak of each phase, in order; up to the first that took more than the limit, if there was one.
        chunks: Of the rewards and losses that look at frames alone, by their place in the config: how many at a time.
    """

    resident: dict[str, int]
    phases: dict[str, Memory]
    chunks: dict[str, int]

    @property
    def peak(self) -> int:
        return max(memory.device for memory in self.phases.values())

    @property
    def host(self) -> int:
        return max(memory.host for memory in self.phases.values())

    @property
    def complete(self) -> bool:
        """True if all phases are there."""
        return "optimizer" in self.phases

    @property
    def largest(self) -> str:
        """The phase that needs most of the device."""
        return max(self.phases, key=lambda name: self.phases[name].device)


class TooLarge(Exception):
    """A phase took more than it may, so that the rest of the step does not matter."""


class PhasePeaks:
    """The peaks of named phases, for `DirectGradient.phases`.

    A phase inside another counts for the inner one alone, and so does what the outer one does after it, because the
    inner one's tensors are still there.

    Args:
        count: What they are read from.
        weights: Bytes to be added: of the device, and of the host.
        limit: After a phase that took more, `TooLarge` is raised; not after the last but one.
        backward: With what the backward pass begins.
    """

    def __init__(self, count: StorageCount, weights: Memory, limit: float, backward: str = "reward backward") -> None:
        self._count, self._weights, self._limit, self._backward = count, weights, limit, backward
        self._open: list[str] = []
        self.peaks: dict[str, Memory] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._measure()
        if self._open:
            self._check(self._open[-1])
        self._open.append(self._backward if name == "backward" else name)
        try:
            yield
        finally:
            self._measure()
            ended = self._open.pop()
            if self._open:
                self._open[-1] = ended
        self._check(ended)

    def turn(self, name: str) -> None:
        """Give the innermost phase another name from here on."""
        self._measure()
        self._check(self._open[-1])
        self._open[-1] = name

    def _measure(self) -> None:
        count = self._count
        if self._open:
            name = self._open[-1]
            before = self.peaks.get(name, Memory(0, 0))
            device, host = self._weights.device + count.peak, self._weights.host + count.host_peak
            self.peaks[name] = Memory(max(before.device, device), max(before.host, host))
        count.peak, count.host_peak = count.now, count.host

    def _check(self, ended: str) -> None:
        # The optimizer's step costs nothing to count, and makes the figures complete.
        if self.peaks[ended].device > self._limit and ended != "denoiser backward":
            raise TooLarge


def simulate(config: Config, limit: float = math.inf) -> Figures:
    """The memory of a training step of this run, without its weights and without a GPU.

    Sampling takes one step more than carry gradient: further ones repeat the same peak. The text encoder's weights
    count, its run does not: prompt embeddings are given. No file of data is opened: clips are of the largest bucket,
    and have the roles that the config names. Buffers inside a kernel are not seen.

    Args:
        limit: Bytes of the device: after a phase that takes more, the others are not looked at.

    Raises:
        UsageError: A model that is neither a folder nor known, a call that the pipeline does not take, or a reward
            whose checkpoint is not known.
    """
    mode = Simulation()
    with tempfile.TemporaryDirectory() as temporary:
        hub, folder = Path(temporary, "hub"), Path(temporary, "model")
        write_hub(hub)
        name = config.model.name
        if not Path(name).is_dir():
            if name not in known_models():
                raise UsageError(
                    f"model.name: the planner has no shapes for {name!r}; give a folder with the pipeline's "
                    f"configuration files, or one of {', '.join(known_models())}"
                )
            write_pipeline(known_models()[name], folder)
            name = str(folder)
        with weightless(mode, hub):
            # Fused LoRAs change no shape; the stand-in is the whole pipeline already.
            own: dict[str, Any] = {"loras": {}} | ({} if name == config.model.name else _FOUND)
            config = replace(config, model=replace(config.model, name=name, **own))  # type: ignore[type-var]
            with without_safety_checkers(Path(name)):
                loaded = load(config, mode)
            make_weightless(mode, loaded.models.objective)
            with simulated(mode, loaded.models.pipe.scheduler), _refusals(loaded.models.pipe):
                return one_step(config, loaded, limit)


@contextmanager
def _refusals(pipe: Any) -> Iterator[None]:
    """Within the context, a call whose arguments the pipeline itself refuses is a UsageError."""
    check = pipe.check_inputs

    @functools.wraps(check)
    def checked(*args: Any, **kwargs: Any) -> None:
        try:
            check(*args, **kwargs)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"model.call: {type(pipe).__name__} refuses it: {reason}") from error

    with mock.patch.object(pipe, "check_inputs", checked):
        yield


@dataclass(frozen=True)
class Loaded:
    """A run's models, ready for training, and what stands for a micro-batch of its data.

    Attributes:
        encoders: Bytes of the text encoders that were let go after prompts had been encoded.
    """

    models: Models
    batch: MicroBatch
    encoders: int


def load(config: Config, new_weights: AbstractContextManager[Any] | None = None) -> Loaded:
    """Load what a run trains with, as the trainer does; `new_weights` is the context in which its LoRA is made."""
    with _shapes_of_default_checkpoints_only():
        models = load_models(
            config, torch.device("cpu"), lambda pipe: [{**config.model.call, **_shape(config)}], new_weights
        )
    models.trainable.train()
    batch, encoders = micro_batch(config, models.pipe, models.objective), 0
    if config.model.encode_prompts_once:
        encoders = sum(map(_bytes, text_encoders(models.pipe).values()))
        release_text_encoders(models.pipe)
    return Loaded(models, batch, encoders)


@contextmanager
def _shapes_of_default_checkpoints_only() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        if any(isinstance(cause, OSError) for cause in _causes(error)):  # a file that is not there, or not on the hub
            raise UsageError(
                f"{error} The planner downloads nothing: it has the shapes of the default checkpoints of "
                "aesthetic, clip_score, hps_v2 and pick_score; give the others as local files"
            ) from error
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    while error.__cause__ is not None:
        error = error.__cause__
        yield error


def one_step(config: Config, loaded: Loaded, limit: float = math.inf) -> Figures:
    """Count what the last micro-batch and the optimizer's step of any training step but the first allocate.

    The weights, real or fake, were made before, and are added.
    """
    models = loaded.models
    terms = {(term.kind, name): term.module for name, term in models.objective.terms.items()}
    parameters = models.trainable.parameters
    of_terms = _sizes({" ".join(key): part for key, part in terms.items()})
    resident = _sizes(models.pipe.components) | of_terms
    if loaded.batch.videos:
        resident["clips"] = sum(video.untyped_storage().nbytes() for video in loaded.batch.videos.values())
    weights = Memory(sum(resident.values()), models.offloaded)
    train, backprop = config.train, config.gradient.policy()
    with StorageCount() as count:
        optimizer = make_optimizer(parameters, train)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        if train.batch_size == train.micro_batch:
            optimizer.zero_grad(set_to_none=True)
        resident["optimizer"] = count.now
        average = None if config.ema.decay is None else Average(parameters, config.ema.decay)
        resident["average"] = count.now - resident["optimizer"]

        # Nothing else is pulled back there if the losses were, while decoding, or if nothing is decoded.
        straight = can_stream(models.objective, backprop) or not models.objective.reads_pixels
        peaks = PhasePeaks(count, weights, limit, "denoiser backward" if straight else "reward backward")
        if loaded.encoders:  # when the rest of the pipeline is not yet on the device
            peaks.peaks["encoding prompts"] = Memory(loaded.encoders + sum(of_terms.values()), weights.host)
        method = make_method(
            config,
            models,
            peaks,
            call={**config.model.call, **_steps(config, models.pipe)},
            decode=_marking_the_backward_pass(peaks),
        )
        statistics = {name: Statistics(0.0, 1.0, 1.0) for name in models.objective.terms}
        with suppress(TooLarge):
            method.accumulate(loaded.batch, statistics)
            with peaks("optimizer"):
                nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
                optimizer.step()
                if average is not None:
                    average.update()
                optimizer.zero_grad(set_to_none=True)
    chunks = {
        f"{_SECTIONS[kind]}.{name}": part.frames_per_chunk
        for (kind, name), part in terms.items()
        if isinstance(part, FrameReward | FrameLoss) and "frames_per_chunk" in inspect.signature(type(part)).parameters
    }
    return Figures(resident, peaks.peaks, chunks)


def _sizes(parts: Mapping[str, Any]) -> dict[str, int]:
    return {name: _bytes(part) for name, part in parts.items() if isinstance(part, nn.Module)}


def _bytes(module: nn.Module) -> int:
    tensors = [part for tensor in (*module.parameters(), *module.buffers()) for part in stored_tensors(tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _marking_the_backward_pass(peaks: PhasePeaks) -> Callable[..., Tensor]:
    """Decode so that the backward pass says, as it reaches pixels and latents, what it goes through next."""

    def decode(vae: nn.Module, latents: Tensor, backprop: Backprop, **kwargs: Any) -> Tensor:
        pixels = decode_selected_frames(vae, latents, backprop, **kwargs)
        latents.register_hook(lambda gradient: peaks.turn("denoiser backward"))
        pixels.register_hook(lambda gradient: peaks.turn("decoder backward"))
        return pixels

    return decode


def micro_batch(config: Config, pipe: Any, objective: Objective) -> MicroBatch:
    size, shape = config.train.micro_batch, _shape(config)
    videos = _videos(config, config.data.clips, *shape.values()) if config.data.clips else {}
    return MicroBatch(
        inputs=_inputs(pipe, {**config.model.call, **shape}, size, embeddings(Path(config.model.name)))
        | as_taken(pipe, shape),
        prompts=["a video"] * size,
        frame_seeds=list(range(size)),
        weights=None if videos else {name: [1.0] * size for name in objective.terms},
        seeds=list(range(size)),
        videos=videos,
    )


def _steps(config: Config, pipe: Any) -> dict[str, int]:
    """Sampling steps to simulate: one more than carry gradient, if those are the last ones; otherwise all.

    Where one denoiser makes the steps of high noise and another those of low noise, as many as it takes until the last
    ones are those of the same denoisers as in the run.
    """
    if config.gradient.steps is not None:
        return {}
    last = config.gradient.last_steps or 1
    boundary = getattr(pipe.config, "boundary_ratio", None)
    if boundary is None:
        return {"num_inference_steps": last + 1}
    scheduler = copy.deepcopy(pipe.scheduler)

    def of_low_noise(count: int) -> list[bool]:
        scheduler.set_timesteps(count)
        return (scheduler.timesteps[-last:] < boundary * scheduler.config.num_train_timesteps).tolist()

    whole = config.model.call.get("num_inference_steps", _default(type(pipe).__call__, "num_inference_steps"))
    fewer = (count for count in range(last + 1, whole) if of_low_noise(count) == of_low_noise(whole))
    return {"num_inference_steps": next(fewer, whole)}


def _shape(config: Config) -> dict[str, int]:
    """Frames and size in the pipeline's call, for the largest bucket; empty for prompts without any."""
    shapes = [Bucket(*shape) for shape in config.data.buckets]
    if config.data.clips is not None:
        shapes = buckets(config, config.data.clips)
    return max(shapes, key=lambda b: b.frames * b.height * b.width).arguments if shapes else {}


def _videos(config: Config, clips: Clips, frames: int, height: int, width: int) -> dict[str, Tensor]:
    """Black clips, with values, because they become pictures where the pipeline's call takes them."""
    roles = {*(clips.columns or ("target",)), *config.prediction.roles.values()} - {"caption"}
    if clips.degradation is not None or clips.mask is not None:
        roles.add("degraded")
    if clips.mask is not None:
        roles.add("mask")
    return {
        role: torch.zeros(
            config.train.micro_batch,
            1 if role == "image" else frames,
            1 if role == "mask" else 3,
            height,
            width,
        )
        for role in sorted(roles)
    }


def _inputs(
    pipe: Any, call: dict[str, Any], size: int, known: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Any]:
    """Stand-ins for prompts and images: embeddings of the shapes that the pipeline's own encoders give."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    generators = [torch.Generator().manual_seed(seed) for seed in range(size)]
    inputs: dict[str, Any] = {"generator": generators if size > 1 else generators[0]}  # as of a run's batches
    if "image" in parameters and parameters["image"].default is inspect.Parameter.empty:
        from PIL import Image

        inputs["image"] = Image.new("RGB", _image_size(pipe, call))
    if "prompt_embeds" in parameters:
        dtype = pipe.text_encoder.dtype
        shapes = known or {"prompt_embeds": (_text_length(pipe, call), pipe.text_encoder.config.hidden_size)}
        for key, (length, width) in shapes.items():
            for name in (key, f"negative_{key}"):
                inputs[name] = torch.zeros(size, length, width, dtype=dtype)
                masks = {name.replace("embeds", "attention_mask"), name.replace("embeds", "embeds_mask")}
                for mask in masks & parameters.keys():
                    # Branched on by pipelines, so it has values.
                    inputs[mask] = torch.tensor([[True] * length] * size)
    if "pooled_prompt_embeds" in parameters:
        inputs["pooled_prompt_embeds"] = torch.zeros(size, pipe.text_encoder_2.config.hidden_size, dtype=dtype)
    return inputs


def _image_size(pipe: Any, call: dict[str, Any]) -> tuple[int, int]:
    """Width and height, of the video."""
    size = {key: call.get(key, _default(type(pipe).__call__, key)) for key in ("width", "height")}
    if missing := [key for key in ("height", "width") if size[key] is None]:
        raise UsageError(
            f"model.call: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, for which "
            f"{type(pipe).__name__} has no default; the planner needs the size of its image"
        )
    return size["width"], size["height"]


def _text_length(pipe: Any, call: dict[str, Any]) -> int:
    """Tokens that the pipeline pads a prompt to."""
    from transformers.tokenization_utils_base import LARGE_INTEGER

    key = "max_sequence_length"
    given = call.get(key) or _default(type(pipe).__call__, key) or _default(pipe.encode_prompt, key)
    if given is not None:
        return given
    # A tokenizer that was saved without a limit has an enormous one, so that the encoder's counts too.
    limits = (pipe.tokenizer.model_max_length, getattr(pipe.text_encoder.config, "max_position_embeddings", None))
    length = min(limit for limit in limits if limit is not None)
    if length > LARGE_INTEGER:
        raise UsageError(
            f"model.name: how long the prompts of {type(pipe).__name__} are is not known; write model_max_length into "
            "tokenizer/tokenizer_config.json of its folder"
        )
    return int(length)


def _default(function: Callable[..., Any], name: str) -> Any:
    """Default of an argument; None if it has none, or there is no such argument."""
    parameter = inspect.signature(function).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default

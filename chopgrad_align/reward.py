"""What a reward is, how one is named and loaded, and how a wrong one is found before long work.

A reward is any callable `reward(video, prompts) -> scores` as `Reward` says. `FrameReward` is the base of those that
look at each frame alone: it subsamples, chunks and recomputes, so that a long video needs the memory of one chunk.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import UsageError

ENTRY_POINTS = "chopgrad_align.rewards"
_SPELLINGS = "a published name, 'package.module:Class' or 'path/to/file.py:Class'"
# What to install for a module whose package is called otherwise, or is an extra of this package.
_INSTALL = {
    "hpsv2": "'chopgrad-align[hps]'",
    "lpips": "'chopgrad-align[metrics]'",
    "open_clip": "open_clip_torch",
    "torchmetrics": "'chopgrad-align[metrics]'",
}


class Reward(Protocol):
    """One differentiable score a video; higher is better. Never a loss: sign and weight are applied once, outside."""

    def __call__(self, video: Tensor, prompts: list[str]) -> Tensor:
        """Score `video` `(B, F, 3, H, W)` in [0, 1], sample b against `prompts[b]`; returns `(B,)`."""
        ...


class FrameReward(nn.Module, ABC):
    """A reward that scores every frame alone; a video's score is the mean over its frames.

    Args:
        frames: How many evenly spaced frames of a video are scored (the middle one for 1; all when it has fewer).
            None scores every frame.
        frames_per_chunk: How many frames are scored at a time. When there are more, each chunk runs again in the
            backward pass, so that the activations of one chunk are alive at any moment.

    Raises:
        UsageError: An argument is not a positive whole number, or a call's shapes do not fit together.
    """

    def __init__(self, *, frames: int | None = None, frames_per_chunk: int = 8) -> None:
        super().__init__()
        for argument, value in (("frames", frames), ("frames_per_chunk", frames_per_chunk)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not (whole or (argument == "frames" and value is None)):
                raise UsageError(f"{type(self).__name__}({argument}={value!r}): expected a whole number, 1 or more")
        self.frames = frames
        self.frames_per_chunk = frames_per_chunk

    @abstractmethod
    def score_frames(self, frames: Tensor, prompts: list[str]) -> Tensor:
        """Score `frames` `(N, 3, H, W)` in [0, 1], frame n against `prompts[n]`; returns `(N,)`."""

    def selected_frames(self, total: int) -> list[int]:
        """Indices of the frames that are scored in a video of `total` frames, in order."""
        if self.frames is None or self.frames >= total:
            return list(range(total))
        if self.frames == 1:
            return [total // 2]
        return [round(i * (total - 1) / (self.frames - 1)) for i in range(self.frames)]

    def forward(self, video: Tensor, prompts: list[str]) -> Tensor:
        """Mean score over the selected frames of `video` `(B, F, 3, H, W)` in [0, 1]; `(B,)`, at least float32."""
        name = type(self).__name__
        if video.ndim != 5 or video.shape[2] != 3 or isinstance(prompts, str) or len(prompts) != len(video):
            given = repr(prompts) if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise UsageError(
                f"{name}: expected a video (B, F, 3, H, W) and a list of B prompts, "
                f"got {tuple(video.shape)} and {given}"
            )
        selected = self.selected_frames(video.shape[1])
        if len(selected) < video.shape[1]:
            video = video[:, selected]
        frames = video.flatten(0, 1)
        prompts_of_frames = [prompt for prompt in prompts for _ in selected]
        # One chunk alone gains nothing from running twice: its activations are the peak either way.
        recompute = len(frames) > self.frames_per_chunk and frames.requires_grad and torch.is_grad_enabled()

        scores = []
        for start in range(0, len(frames), self.frames_per_chunk):
            chunk = frames[start : start + self.frames_per_chunk]
            texts = prompts_of_frames[start : start + self.frames_per_chunk]
            score = (
                checkpoint(self.score_frames, chunk, texts, use_reentrant=False)
                if recompute
                else self.score_frames(chunk, texts)
            )
            scores.append(check_scores(f"{name}.score_frames", score, len(chunk)))
        all_scores = torch.cat(scores)
        all_scores = all_scores.to(torch.promote_types(all_scores.dtype, torch.float32))
        return all_scores.view(len(video), len(selected)).mean(1)


# --- loading ----------------------------------------------------------------------------------------------------------


def load_reward(name: str, **args: object) -> Reward:
    """Construct a reward from its name in a config.

        load_reward("hps_v2", version="v2.1")
        load_reward("my_package.rewards:Sharpness", radius=2)
        load_reward("rewards/sharpness.py:Sharpness")          # relative to the current directory

    Args:
        name: A published name (entry point group `chopgrad_align.rewards`), `package.module:Class`, or
            `path/to/file.py:Class`. Instead of a class, any callable that returns a reward.
        args: Given to it by keyword.

    Returns:
        The reward; a `nn.Module` has its weights frozen, is in eval mode and still on the CPU.

    Raises:
        UsageError: The name, module, file, attribute or an argument is wrong, or a package is not installed.
    """
    location, colon, attribute = name.rpartition(":")
    if not colon:
        location, _, attribute = _published(name).rpartition(":")
    module = _file(location, name) if _is_path(location) else _module(location, name)
    if not hasattr(module, attribute):
        candidates = [a for a in vars(module) if not a.startswith("_")]
        raise UsageError(f"reward {name!r}: {location} has no {attribute!r}{_nearest(attribute, candidates)}")
    factory = getattr(module, attribute)
    if not callable(factory):
        raise UsageError(f"reward {name!r}: {attribute} is a {type(factory).__name__}, expected a class")
    _check_arguments(factory, name, args)
    reward = factory(**args)
    if not callable(reward):
        raise UsageError(
            f"reward {name!r} made a {type(reward).__name__}, which cannot be called as reward(video, prompts)"
        )
    if isinstance(reward, nn.Module):
        reward.requires_grad_(False).eval()
    return reward


def _nearest(name: str, candidates: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, candidates, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _published(name: str) -> str:
    """`module:Class` of an entry point."""
    known: dict[str, set[str]] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        known.setdefault(entry.name, set()).add(entry.value)
    if name not in known:
        hint = f"; for a class in that file, write '{name}:Class'" if _is_path(name) else _nearest(name, list(known))
        raise UsageError(f"no reward is called {name!r}{hint}. Known: {', '.join(sorted(known))}; or give {_SPELLINGS}")
    if len(known[name]) > 1:
        raise UsageError(f"several packages publish a reward {name!r}: choose {' or '.join(sorted(known[name]))}")
    return known[name].pop()


def _is_path(location: str) -> bool:
    return location.endswith(".py") or "/" in location or "\\" in location


def _module(location: str, name: str) -> ModuleType:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", location):
        raise UsageError(f"reward {name!r}: expected {_SPELLINGS}")
    try:
        return importlib.import_module(location)
    except Exception as error:  # the module is someone else's code and can fail in any way
        raise _import_error(location, name, error) from error


def _file(location: str, name: str) -> ModuleType:
    path = Path(location).expanduser().resolve()
    if not path.is_file():
        raise UsageError(f"reward {name!r}: no such file {path}")
    # A private name: the file can be called like any installed module and still hides none.
    private = f"_chopgrad_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(private, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"reward {name!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[private] = module  # dataclasses and pickle look the module up by its name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[private]
        raise _import_error(location, name, error) from error
    return module


def _import_error(location: str, name: str, error: Exception) -> UsageError:
    if isinstance(error, ModuleNotFoundError) and error.name:
        if f"{location}.".startswith(f"{error.name}."):
            return UsageError(
                f"reward {name!r}: no module named {error.name!r}; install its package, "
                "or for a file of yours write 'path/to/file.py:Class'"
            )
        package = error.name.partition(".")[0]
        return UsageError(
            f"reward {name!r} needs the module {error.name!r}, which is not installed: "
            f"pip install {_INSTALL.get(package, package)}"
        )
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else f"{last.filename}:{last.lineno}"
    return UsageError(f"reward {name!r}: importing {location} failed at {place}: {type(error).__name__}: {error}")


def _check_arguments(factory: object, name: str, args: dict[str, object]) -> None:
    try:
        signature = inspect.signature(factory)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # some built-in callables have none
        return
    try:
        signature.bind(**args)
    except TypeError as error:
        unknown = [a for a in args if a not in signature.parameters]
        nearest = _nearest(unknown[0], list(signature.parameters)) if unknown else ""
        accepted = ", ".join(str(p).split(":")[0].split("=")[0] for p in signature.parameters.values()) or "none"
        raise UsageError(f"reward {name!r}: {error}{nearest}. Its arguments: {accepted}") from error


# --- checks -----------------------------------------------------------------------------------------------------------


def check_scores(name: str, scores: object, batch: int) -> Tensor:
    """Return `scores` if they are a floating-point tensor `(batch,)`; cheap enough for every step.

    Raises:
        UsageError: They are not. Finiteness is not looked at: that would wait for the device.
    """
    if not isinstance(scores, Tensor):
        raise UsageError(f"{name} returned a {type(scores).__name__} ({scores!r:.60}), expected a tensor ({batch},)")
    if not scores.is_floating_point():
        raise UsageError(f"{name} returned {scores.dtype} scores, expected floating point")
    if scores.shape != (batch,):
        raise UsageError(
            f"{name} returned scores of shape {tuple(scores.shape)} for a batch of {batch}, expected ({batch},): "
            "one score a sample"
        )
    return scores


def check_reward(
    reward: Reward,
    name: str,
    *,
    prompts: Sequence[str] = ("a red circle", "a blue square on the grass"),
    frames: int = 5,
    size: tuple[int, int] = (64, 64),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Score a small random video and take its gradient: a broken reward is found before long work.

    Args:
        reward: Already on `device`.
        name: What the messages call it.
        prompts: One for each sample of the probe.
        frames: Frames of the probe; a video model may need a certain number.
        size: Its height and width, in pixels.
        device: Where the probe lives, as the rollout's videos will.
        dtype: Floating-point type of the probe.

    Raises:
        UsageError: The scores are not a tensor, not `(B,)` or not finite; they carry no gradient, or it is not finite,
            or it is zero everywhere in some sample (a constant, or a score of another sample).
    """
    generator = torch.Generator().manual_seed(0)
    shape = (len(prompts), frames, 3, *size)
    video = torch.rand(shape, generator=generator).to(device, dtype).requires_grad_()
    with torch.enable_grad():
        scores = check_scores(f"reward {name!r}", reward(video, list(prompts)), len(prompts))
    values = scores.detach().tolist()
    context = f"on a random video {shape} it scored {values}"
    if not torch.isfinite(scores).all():
        raise UsageError(f"reward {name!r} is not finite: {context}")
    if not scores.requires_grad:
        raise UsageError(
            f"reward {name!r} has no gradient: its scores do not require grad; "
            f"remove no_grad, detach, item, round or conversions to numpy or PIL ({context})"
        )
    # Different weights, so that gradients of samples compared with each other cannot cancel.
    weights = torch.arange(1, len(prompts) + 1).to(scores)
    (gradient,) = torch.autograd.grad(scores, video, weights, allow_unused=True)
    if gradient is None:
        gradient = torch.zeros_like(video)
    if not torch.isfinite(gradient).all():
        raise UsageError(f"reward {name!r} has a gradient that is not finite ({context})")
    dead = [b for b, sample in enumerate(gradient) if not sample.any()]
    if dead:
        raise UsageError(
            f"reward {name!r} is constant: its gradient is zero in every pixel of sample {dead[0]} ({context})"
        )

"""The fastest setting of a run that fits a card."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from ..training.config import Config
from ..training.config_file import load_config, to_yaml
from .simulate import Figures, simulate

Setting = dict[str, Any]
"""Keys of a run's config, such as `gradient.cache`, and their values."""


@dataclass(frozen=True)
class Lever:
    """Ways to set one thing, the fastest first; each later one needs less memory in some phases of a step."""

    phases: tuple[str, ...]
    rungs: list[Setting]


@dataclass(frozen=True)
class Trial:
    """A setting and what it needs."""

    setting: Setting
    figures: Figures


@dataclass(frozen=True)
class Plan:
    """The result of `make_plan`.

    Attributes:
        chosen: The fastest setting that fits, or None.
        trials: All that were simulated, in order; without a chosen one, the last needs the least.
        limit: Bytes of the device that a step may take.
    """

    chosen: Trial | None
    trials: list[Trial]
    limit: int


class Simulate(Protocol):
    def __call__(self, config: Config, limit: float) -> Figures: ...


PHASES = (
    "sampling",
    "decoding",
    "reward",
    "reward backward",
    "decoder backward",
    "denoiser backward",
    "optimizer",
)
"""Phases of a training step, in order."""


def levers(config: Config, chunks: Mapping[str, int]) -> list[Lever]:
    """The levers of a run, in decreasing order of time.

    Args:
        chunks: Of the rewards and losses that look at frames alone, by their place in the config: how many at a time.
    """
    batch = config.train.micro_batch
    found = [Lever(PHASES[:-1], [{"train.micro_batch": n} for n in range(batch, 0, -1) if batch % n == 0])]
    if config.gradient.decoder != "full":
        recompute = ((False, None), (True, None), (True, 128))
        rungs = [{"gradient.checkpoint": again, "gradient.rows": rows} for again, rows in recompute]
        found.append(Lever(("decoding", "decoder backward"), rungs))
    # The activations that the denoiser keeps stay until its turn. (Until then its call again keeps less than its blocks
    # again; but that is tried before.)
    kept = [("none", "device"), ("call", "device"), ("block", "device"), ("block", "host"), ("nested", "device")]
    graphs: list[Setting] = [
        {"gradient.denoiser.checkpoint": again, "gradient.denoiser.inputs": place} for again, place in kept
    ]
    found.append(Lever(PHASES[:-1], graphs))
    if config.gradient.decoder != "full":
        alive = ("decoding", "reward", "reward backward", "decoder backward")
        found.append(Lever(alive, [{"gradient.cache": place} for place in ("device", "host")]))
    smaller = [n for n in (4, 2, 1) if any(n < size for size in chunks.values())]
    rungs = [{f"{place}.args.frames_per_chunk": min(n, size) for place, size in chunks.items()} for n in smaller]
    streamed = (
        ("decoding",) if config.gradient.policy().one_pass else ()
    )  # losses of single frames are then taken there
    return [*found, Lever((*streamed, "reward", "reward backward"), [{}, *rungs])]


def make_plan(
    config: Config,
    limit: int,
    trying: Callable[[Setting], None] = lambda setting: None,
    simulate: Simulate = simulate,
) -> Plan:
    """Find the fastest setting of a run whose training step takes at most `limit` bytes of the device.

    Settings are tried from the fastest on. One that is too large in a phase rules out all that need no less in that
    phase, because none of its levers is further on. What no lever sets stays as the config has it.

    Args:
        trying: Called before each simulation, which takes up to a minute or so.
        simulate: As `simulate.simulate`.

    Raises:
        UsageError: As `simulate.simulate`.
    """
    trials: list[Trial] = []

    def trial(rungs: Sequence[Setting], limit: float) -> Figures:
        setting = {key: value for rung in rungs for key, value in rung.items()}
        trying(setting)
        trials.append(Trial(setting, simulate(with_setting(config, setting), limit)))
        return trials[-1].figures

    figures = trial([lever.rungs[0] for lever in levers(config, {})], limit)
    ladder = levers(config, figures.chunks)
    places = list(itertools.product(*(range(len(lever.rungs)) for lever in ladder)))
    while places and figures.peak > limit:
        at = places[0]
        relevant = [index for index, lever in enumerate(ladder) if figures.largest in lever.phases]
        places = [place for place in places if any(place[index] > at[index] for index in relevant)]
        if places:
            figures = trial([lever.rungs[rung] for lever, rung in zip(ladder, places[0], strict=True)], limit)
    if figures.peak <= limit:
        return Plan(trials[-1], trials, limit)
    # The last one needs the least if it went to the end, and no lever of its largest phase can go further.
    if not (figures.complete and all(at[index] == len(ladder[index].rungs) - 1 for index in relevant)):
        passed = {name for name, memory in figures.phases.items() if memory.device <= limit}
        least = [
            lever.rungs[rung if passed.issuperset(lever.phases) else -1] for lever, rung in zip(ladder, at, strict=True)
        ]
        trial(least, math.inf)
    return Plan(None, trials, limit)


def with_setting(config: Config, setting: Setting) -> Config:
    """The config with a setting, through the loader that reads config files."""
    return _through_loader(to_yaml(config), [f"{key}={json.dumps(value)}" for key, value in setting.items()])


def sections(model: str, rewards: Sequence[str], call: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a config that are a model in bfloat16, arguments of its pipeline's call, and rewards."""
    return {
        "model": {"name": model, "dtype": "bfloat16", "vae_dtype": "bfloat16", "call": dict(call)},
        "rewards": {name: {"name": name} for name in rewards},
    }


def config_of(given: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """A run with these sections and the defaults of all else.

    Raises:
        UsageError: As `load_config`.
    """
    rest = {
        "run": {"folder": "runs/planned"},
        "data": {"train": "${configs:prompts/train.txt}", "held_out": "${configs:prompts/held_out.txt}"},
        "train": {"steps": 1},
    }
    return _through_loader(yaml.safe_dump({**rest, **given}), overrides)


def _through_loader(text: str, overrides: Sequence[str]) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(text)
        return load_config(path, overrides)

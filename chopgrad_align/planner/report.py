"""A plan in words, as a config fragment, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf

from .choose import Plan, Setting, Trial
from .simulate import Figures

_GIB = 2**30
_REMEDY = {
    "encoding prompts": "smaller text encoders or rewards",
    "sampling": "fewer frames, a smaller size, or guidance_scale=1 if the model can do without",
    "decoding": "fewer frames or a smaller size",
    "reward": "fewer frames of the reward or loss (its args.frames), or a smaller one",
    "reward backward": "fewer frames of the reward or loss (its args.frames), or a smaller one",
    "decoder backward": "a smaller size",
    "denoiser backward": "fewer frames or a smaller size",
    "optimizer": "a smaller lora.rank",
}


def fragment(setting: Setting, given: Mapping[str, Any], overrides: Sequence[str] = ()) -> str:
    """Sections of a config as YAML: those that the plan was asked for, what was changed by hand, and the setting."""
    settings = [f"{key}={json.dumps(value)}" for key, value in setting.items()]
    tree = OmegaConf.merge(OmegaConf.create(dict(given)), OmegaConf.from_dotlist([*overrides, *settings]))
    return yaml.safe_dump(OmegaConf.to_container(tree), sort_keys=False)


def table(figures: Figures) -> str:
    """Each phase's peak, and what of it stays."""
    parts = sorted(figures.resident.items(), key=lambda item: -item[1])
    resident = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in parts if size / _GIB >= 0.05)
    lines = [f"{'GiB at the peak of':<20} {'device':>8} {'host':>8}"]
    lines += [f"{name:<20} {m.device / _GIB:>8.1f} {m.host / _GIB:>8.1f}" for name, m in figures.phases.items()]
    return "\n".join([*lines, f"of the device, {sum(figures.resident.values()) / _GIB:.1f} stay: {resident}"])


def as_it_is(figures: Figures) -> str:
    """The peak of a run whose settings stay what they are, in one line."""
    host = f", and {figures.host / _GIB:.1f} GiB of host memory" if figures.host >= _GIB / 20 else ""
    return f"{figures.peak / _GIB:.1f} GiB of the device, in the phase '{figures.largest}'{host}"


def in_words(plan: Plan, given: Mapping[str, Any], overrides: Sequence[str] = ()) -> str:
    """The table of the chosen setting and its fragment, or of the setting that needs the least and what would help."""
    limit = f"{plan.limit / _GIB:.1f} GiB"
    if plan.chosen is not None:
        figures = plan.chosen.figures
        text = f"fits: {figures.peak / _GIB:.1f} of {limit}, and {figures.host / _GIB:.1f} GiB of host memory"
        yaml_text = fragment(plan.chosen.setting, given, overrides)
        return f"{table(figures)}\n\n{text}; the fastest setting that does:\n\n{yaml_text}"
    figures = plan.trials[-1].figures
    resident = sum(figures.resident.values())
    if resident > plan.limit:
        remedy = (
            f"of it {resident / _GIB:.1f} stay on the device all the time: take a larger card, a smaller model or "
            "reward, or bfloat16 weights where they are float32"
        )
    else:
        remedy = f"take a larger card, or {_REMEDY[figures.largest]}"
    least = f"the least is {figures.peak / _GIB:.1f} GiB, in the phase '{figures.largest}'"
    return f"{table(figures)}\n\nnothing fits {limit}: {least}; {remedy}\n"


def in_json(plan: Plan, given: Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that was simulated; memory in bytes. A setting that did not fit has its phases up to that point."""

    def as_dict(trial: Trial) -> dict[str, Any]:
        figures = trial.figures
        phases = {name: {"device": memory.device, "host": memory.host} for name, memory in figures.phases.items()}
        peaks = {"device": figures.peak, "host": figures.host, "complete": figures.complete}
        return {"setting": trial.setting, **peaks, "resident": figures.resident, "phases": phases}

    return {
        "limit": plan.limit,
        "fits": plan.chosen is not None,
        "chosen": plan.chosen and as_dict(plan.chosen),
        "config": plan.chosen and yaml.safe_load(fragment(plan.chosen.setting, given, overrides)),
        "trials": [as_dict(trial) for trial in plan.trials],
    }

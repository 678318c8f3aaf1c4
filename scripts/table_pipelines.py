"""Write docs/pipelines.md: every class of diffusers that makes videos, and what a run of it needs.

    PYTHONPATH=tests python scripts/table_pipelines.py

What can be asked of the classes is asked of them, at the sizes of the published models and without weights; calls, rows
and what is tested are those of tests/every_pipeline, from which tests/test_every_pipeline.py runs.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from every_pipeline import ENTRIES, NOT_SAMPLERS, Entry
from every_pipeline.entry import TARGETS, TOLERANCE
from table_decoders import CONFIGS

from chopgrad_align import UsageError
from chopgrad_align.common import command_line as cli
from chopgrad_align.sampling.predictions.latents import known_family
from chopgrad_align.sampling.rollout import check_call
from chopgrad_align.sampling.row_arguments import frames_name

# What published models have where a class says nothing.
PUBLISHED: dict[str, dict[str, Any]] = CONFIGS | {
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "patch_size": 2,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
    },
}

ABOUT = f"""# Pipelines

Every class of diffusers {diffusers.__version__} whose output is video. `tests/test_every_pipeline.py` runs a tiny
pipeline of each (`pytest -m slow`), whose components are of the published models' classes: `rollout` gives the frames
of the pipeline's own call bit for bit, the gradient of a LoRA is that of plain autograd (to {TOLERANCE} of its norm),
and one step of training runs from its folder. A class that a later diffusers adds fails that test by its name until it
is listed.

- **a row brings**: arguments of the call that are each video's own; the ways that are tested, one after the other.
- **modes**: of `prediction.mode`; `one_step` and `denoise` start from latents that we make, in layouts that we know.
- **LoRA loads by**: `diffusers` is `pipe.load_lora_weights`; where a class has none, it is `chopgrad_align.load_lora`.
  LoRA targets are {", ".join(f"`{target}`" for target in TARGETS)}, unless others are named.
- **frames**, **sides**: what is made exactly, at the sizes of the published models; anything else is refused.
"""


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--output", type=cli.path, default=Path("docs/pipelines.md"))
    args = parser.parse_args()
    classes = dict.fromkeys(name.partition("/")[0] for name in ENTRIES)
    head = ["class", "a row brings", "modes", "LoRA loads by", "frames", "sides", "tested"]
    rows = [row_of(name, entries_of(name)) for name in sorted(classes)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
    left_out = "\n".join(f"- `{name}`: {why}" for name, why in sorted(NOT_SAMPLERS.items()))
    text = f"{ABOUT}\n{table}\n\nNot to be trained by sampling:\n\n{left_out}\n"
    args.output.write_text(f"{text}\nMade by `PYTHONPATH=tests python scripts/table_pipelines.py`.\n")


def entries_of(name: str) -> list[Entry]:
    """The entries of a class: its own, and those of its further modes."""
    return [entry for key, entry in ENTRIES.items() if key.partition("/")[0] == name]


def row_of(name: str, entries: list[Entry]) -> list[str]:
    print(name, file=sys.stderr, flush=True)
    cls = getattr(diffusers, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny = entries[0].make()
        published = without_weights(tiny)
    needed = " or ".join(dict.fromkeys(", ".join(f"`{key}`" for key in entry.row) for entry in entries))
    loader = "diffusers" if hasattr(cls, "load_lora_weights") else "`load_lora`"
    if entries[0].targets != TARGETS:
        loader += f"; {', '.join(f'`{target}`' for target in entries[0].targets)}"
    arguments = inspect.signature(cls.__call__).parameters
    shown = next((key for key, value in entries[0].row.items() if not isinstance(value, str)), "")
    frames = frames_name(arguments)
    sides = dict.fromkeys(rule(published, side) for side in ("height", "width") if side in arguments)
    return [
        f"`{name}`",
        needed,
        "all" if accepts(lambda: known_family(tiny)) else "sample",
        loader,
        rule(published, frames) if frames else f"of `{shown}`",
        ", ".join(sides) or f"of `{shown}`",
        "; ".join(dict.fromkeys(tested(entry) for entry in entries)),
    ]


def without_weights(tiny: Any) -> Any:
    """A pipeline of the same class whose networks are as large as the published ones, on no device."""
    settings = {name: tiny.config[name] for name in inspect.signature(type(tiny)).parameters if name in tiny.config}
    components = settings | tiny.components
    with torch.device("meta"):
        for name, part in components.items():
            if name in ("vae", "transformer", "unet"):
                components[name] = type(part)(**PUBLISHED.get(type(part).__name__, {}))
    return type(tiny)(**components)


def rule(pipe: Any, argument: str) -> str:
    """The numbers that a pipeline makes exactly, of those up to a few hundred."""
    taken = [number for number in range(1, 400) if accepts(functools.partial(check_call, pipe, {argument: number}))]
    if len(taken) < 2:
        return "–"
    step = taken[1] - taken[0]
    return "any" if step == 1 else f"{step}k" if taken[0] == step else f"{step}k + {taken[0]}"


def accepts(check: Callable[[], Any]) -> bool:
    try:
        check()
    except UsageError:
        return False
    return True


def tested(entry: Entry) -> str:
    if entry.fault:
        return f"no: {entry.fault}"
    return f"rollout; no run: {entry.untrained}" if entry.untrained else "yes"


if __name__ == "__main__":
    main()

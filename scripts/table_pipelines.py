"""Write docs/pipelines.md: every class of diffusers that makes videos, and what a run of it needs.

    PYTHONPATH=tests python scripts/table_pipelines.py

What can be asked of the classes is asked of them, at the sizes of the published models and without weights; calls, rows
and what is tested are those of tests/every_pipeline, from which tests/test_every_pipeline.py runs.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from every_pipeline import ENTRIES, NOT_SAMPLERS, Entry
from every_pipeline.entry import TARGETS
from table_decoders import CONFIGS

from chopgrad_align import UsageError
from chopgrad_align.common import command_line as cli
from chopgrad_align.sampling.predictions.latents import known_family
from chopgrad_align.sampling.rollout import check_call

ABOUT = f"""# Pipelines

Every class of diffusers {diffusers.__version__} whose output is video. `tests/test_every_pipeline.py` runs a tiny pipeline of each
(`pytest -m slow`), whose components are of the published models' classes: `rollout` gives the frames of the pipeline's own call
bit for bit, the gradient of a LoRA is that of plain autograd (to 5e-6 of its norm), and one step of training runs from
its folder. A class that a later diffusers adds fails that test by its name until it is listed.

- **a row brings**: arguments of the call that are each video's own; the ways that are tested, one after the other.
- **modes**: of `prediction.mode`; `one_step` and `denoise` start from latents that we make, in the layouts that we know.
- **LoRA loads by**: `diffusers` is `pipe.load_lora_weights`; where that class has none, `chopgrad_align.load_lora` does it.
  LoRA targets are `{"`, `".join(TARGETS)}` unless others are named.
- **frames**, **sides**: what the pipeline makes exactly, at the sizes of the published models; anything else is refused.
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
    frames = next((key for key in ("num_frames", "frames", "video_length") if key in arguments), None)
    sides = [rule(published, side) for side in ("height", "width") if side in arguments]
    return [
        f"`{name}`",
        needed,
        "all" if starts_from_latents(tiny) else "sample",
        loader,
        rule(published, frames) if frames else "those of the video",
        ", ".join(dict.fromkeys(sides)) or "those of the image",
        "; ".join(dict.fromkeys(tested(entry) for entry in entries)),
    ]


def without_weights(tiny: Any) -> Any:
    """A pipeline of the same class whose networks are as large as the published ones, on no device."""
    components = dict(tiny.components)
    with torch.device("meta"):
        for name, part in components.items():
            if name in ("vae", "transformer", "unet"):
                components[name] = type(part)(**CONFIGS.get(type(part).__name__, {}))
    return type(tiny)(**components)


def rule(pipe: Any, argument: str) -> str:
    """The numbers that a pipeline makes exactly, of those up to a few hundred."""
    taken = [number for number in range(1, 400) if accepts(lambda n=number: check_call(pipe, {argument: n}))]
    step = taken[1] - taken[0]
    return "any" if step == 1 else f"{step}k" if taken[0] == step else f"{step}k + {taken[0]}"


def accepts(check: Callable[[], Any]) -> bool:
    try:
        check()
    except UsageError:
        return False
    return True


def starts_from_latents(pipe: Any) -> bool:
    return accepts(lambda: known_family(pipe))


def tested(entry: Entry) -> str:
    if entry.fault:
        return f"no: {entry.fault}"
    return f"rollout; no run: {entry.untrained}" if entry.untrained else "yes"


if __name__ == "__main__":
    main()

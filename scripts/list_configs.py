"""Make docs/configs.md from the files in configs/, and count their memory.

    python scripts/list_configs.py                              # the page
    python scripts/list_configs.py --plan wan2.1_t2v_1.3b_hps   # and the last line of that config's header

`--plan` alone counts all configs of published models, which takes half a minute each.
"""

from __future__ import annotations

import argparse
import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chopgrad_align.common import command_line as cli
from chopgrad_align.common.errors import exit_on_usage_error

if TYPE_CHECKING:
    from chopgrad_align.training.config import Config

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configs.md"
PLAN = "# plan.py: "

_BEGIN = """# Configs

Made by `python scripts/list_configs.py` from the files in [`configs/`](../configs). Each is a whole run; what several
have in common is in a file that they extend, `configs/base/`, and stands nowhere else. A config of your own does the
same with any of them, by a path from its own folder:

```yaml
extends: [/path/to/configs/wan2.1_t2v_14b_hps.yaml]     # one file, or several: each is merged over those before it
run: {folder: runs/mine}
rewards: {hps: {weight: 0.5}}
```

`--print-config` shows the merged one, as `config.yaml` in the run's folder does. Memory is what
`chopgrad-align plan --config FILE` counts for the config as it is, without a card ([planner](planner.md)): the peak
on the device, its phase, and host memory. The sources of a config's settings are links in its header.
"""


@dataclass(frozen=True)
class Header:
    """The comment that a config begins with.

    Attributes:
        text: About the run, up to its sources.
        sources: What it says of them.
        memory: The planner's line; empty if there is none.
    """

    text: str
    sources: str
    memory: str


def header(path: Path) -> Header:
    """Read a config's comment, without the two commands that it begins with."""
    lines = [line for line in path.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if line.startswith("#")]
    memory = next((line.removeprefix(PLAN) for line in lines if line.startswith(PLAN)), "")
    text = "\n".join(line[1:].removeprefix(" ") for line in lines[2:] if not line.startswith(PLAN))
    about, _, sources = text.strip().partition("Sources:")
    return Header(about.strip(), " ".join(sources.split()), memory)


def page() -> str:
    """The page, of all configs."""
    from chopgrad_align.training.config_file import load_config

    tables: dict[str, list[str]] = {"Rewards": [], "Pixel losses": [], "The embedded pipeline": []}
    for path in configs():
        config = load_config(path)
        section = "Rewards" if config.rewards else "Pixel losses"
        tables["The embedded pipeline" if _is_embedded(config) else section].append(_row(path, config))
    parts = [_BEGIN]
    for title, rows in tables.items():
        head = "| config | run | model | frames, size | steps | memory |\n|---|---|---|---|---|---|"
        parts.append(f"## {title}\n\n{head}\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def configs() -> list[Path]:
    return sorted((ROOT / "configs").glob("*.yaml"))


def _is_embedded(config: Config) -> bool:
    return Path(config.model.name).is_dir()


def _row(path: Path, config: Config) -> str:
    call, name = config.model.call, config.model.name
    about = re.split(r"(?<=[.:])\s", " ".join(header(path).text.split()))[0].rstrip(":.")
    model = "the package's own" if _is_embedded(config) else f"[{name}](https://huggingface.co/{name})"
    steps = call["num_inference_steps"] if config.prediction.mode == "sample" else 1
    size = f"{call['num_frames']}, {call['height']}x{call['width']}"
    memory = header(path).memory or ("–" if _is_embedded(config) else "not counted")
    return f"| [`{path.name}`](../configs/{path.name}) | {about} | {model} | {size} | {steps} | {memory} |"


def count(path: Path) -> None:
    """Write what the planner counts into a config's header."""
    from chopgrad_align.planner.report import as_it_is
    from chopgrad_align.planner.simulate import simulate
    from chopgrad_align.training.config_file import load_config

    line = PLAN + as_it_is(simulate(load_config(path)))
    text = path.read_text(encoding="utf-8")
    head, _, rest = text.partition("\n\n")
    kept = [part for part in head.splitlines() if not part.startswith(PLAN)]
    path.write_text("\n".join([*kept, line]) + "\n\n" + rest, encoding="utf-8")
    print(path.stem, line.removeprefix(PLAN), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--plan", nargs="*", metavar="NAME", help="count the memory of these configs, or of all")
    args: argparse.Namespace = parser.parse_args(arguments)
    with exit_on_usage_error():
        if args.plan is not None:
            from chopgrad_align.training.config_file import load_config

            logging.disable(logging.WARNING)  # the model libraries', about weights that are not there
            warnings.simplefilter("ignore")
            for path in configs():
                if path.stem in args.plan or (not args.plan and not _is_embedded(load_config(path))):
                    count(path)
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()

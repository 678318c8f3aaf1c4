"""The console command `chopgrad-align`, which is `python -m chopgrad_align` as well.

chopgrad-align align --config FILE key.sub=value
chopgrad-align COMMAND --help
accelerate launch -q -m chopgrad_align align --config FILE      # on all GPUs of this machine
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .common.command_line import Parser

COMMANDS = {
    "align": "fine-tune a pipeline by rewards and losses on its decoded pixels",
    "generate": "make videos, with or without what a run has trained",
    "score": "score videos by a reward",
    "evaluate": "compare methods of a restoration task on held-out clips",
    "plan": "find the memory that a run needs, and the fastest setting that fits a card",
    "check-reward": "check a reward before training with it",
    "report": "write the page of a run again",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names, with the others."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in COMMANDS:
        import_module(f".commands.{name.replace('-', '_')}", __package__).main(rest)
        return
    listed = "\n".join(f"    {command:<14}{what}" for command, what in COMMANDS.items())
    parser = Parser(f"{__doc__}\n{listed}")
    parser.prog = "chopgrad-align"
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those above")
    parser.parse_args([name])


if __name__ == "__main__":
    main()

"""Write the page of a run, `report.html`, again: also of a run that was cut off, or that still trains.

chopgrad-align report runs/fox
chopgrad-align report runs/fox --watch          # again at each measurement, until Ctrl-C
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from ..common import command_line as cli
from ..common.errors import exit_on_usage_error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.Parser(__doc__, "report")
    parser.add_argument("run", type=cli.path, help="folder of the run")
    parser.add_argument("--watch", action="store_true", help="write it again whenever the run has measured something")
    args = parser.parse_args(arguments)
    with exit_on_usage_error():
        report(args.run, args.watch)


def report(run: Path, watch: bool) -> None:
    """Write the page once, or as long as the run goes on."""
    from ..evaluation.report import write_report
    from ..evaluation.watch import measurements

    with suppress(KeyboardInterrupt) if watch else nullcontext():
        for _ in measurements(run) if watch else range(1):
            print(f"look at {write_report(run)}", flush=True)

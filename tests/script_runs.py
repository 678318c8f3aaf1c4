"""Scripts, run as from the command line but in this process."""

import runpy
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run_script(name, monkeypatch, capsys, *arguments):
    """Exit status, and what it printed to stdout and stderr."""
    path = str(SCRIPTS / name)
    monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
    status = 0
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err

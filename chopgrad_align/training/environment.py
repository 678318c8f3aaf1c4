"""The environment that a run was computed in."""

from __future__ import annotations

import platform
import shlex
import socket
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("chopgrad-align", "torch", "diffusers", "transformers", "peft", "accelerate")


def environment(device: torch.device, processes: int) -> dict[str, str]:
    """Facts that tell one start of a run from another, by name: the time, the command, the machine and the versions.

    The commit is that of the repository that this package is installed from, if it is one.
    """
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "host": socket.gethostname(),
        "processes": f"{processes}, {device.type}",
        **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        "cpu": _cpu(),
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        **({"commit": commit} if (commit := _commit()) else {}),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    """The processor's name; of Linux, where Python does not know it, from `/proc/cpuinfo`."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

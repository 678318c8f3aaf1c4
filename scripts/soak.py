"""Kill a run at random times, resume it by one command until it is complete, and compare it with one left alone.

python scripts/soak.py --out soak                                     # 300 steps of the embedded pipeline: hours
python scripts/soak.py --out soak --steps 20 --kills 6 --mean-seconds 20 train.batch_size=1 validation.pairs=2

Three of four kills are SIGKILL, the others SIGTERM or SIGUSR1. Exit status 1: the two runs differ, or one failed.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from chopgrad_align.common.errors import UsageError, exit_on_usage_error

_ALIGN = Path(__file__).with_name("align.py")
_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1)
_OF_THE_CLOCK = ("seconds/", "peak_memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder for the two runs and result.json")
    parser.add_argument("--config", metavar="FILE", help="of the runs (default: configs/embedded.yaml)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kills", type=int, default=40, help="at most; then the run is left to end")
    parser.add_argument("--mean-seconds", type=float, default=60.0, help="of a process until it is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of the config")
    args = parser.parse_intermixed_args()
    with exit_on_usage_error():
        if args.out.exists():
            raise UsageError(f"--out: {args.out} is there already; give a new folder")
        args.out.mkdir(parents=True)
        result = soak(args, random.Random(args.seed))
    print(json.dumps(result, indent=1))
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(0 if all(result["equal"].values()) else 1)


def soak(args: argparse.Namespace, chance: random.Random) -> dict[str, Any]:
    """Make both runs, and compare them."""
    straight, killed = (args.out / name for name in ("straight", "killed"))
    command = [sys.executable, str(_ALIGN), *(["--config", args.config] if args.config else []), "--resume"]
    command += [f"train.steps={args.steps}", *args.overrides]
    began = time.monotonic()
    if alive_for(None, 0, [*command, f"run.folder={straight}"], args.out / "straight.log"):
        raise UsageError(f"the run that was left alone failed; look at {args.out / 'straight.log'}")
    alone = time.monotonic() - began

    kills = dict.fromkeys(("SIGKILL", "SIGTERM", "SIGUSR1"), 0)
    starts, status = 0, 1
    while status:
        number = chance.choice(_SIGNALS) if sum(kills.values()) < args.kills else None
        seconds = chance.uniform(0, 2 * args.mean_seconds)
        status = alive_for(number, seconds, [*command, f"run.folder={killed}"], args.out / "killed.log")
        starts += 1
        if number is not None and status in (-number, 128 + number):
            kills[signal.Signals(number).name] += 1
        elif status:
            raise UsageError(f"a start ended with status {status}; look at {args.out / 'killed.log'}")
    return {
        "steps": args.steps,
        "kills": kills,
        "starts": starts,
        "seconds": {"straight": round(alone), "killed": round(time.monotonic() - began - alone)},
        "equal": {name: read(straight) == read(killed) for name, read in _COMPARED.items()},
    }


def alive_for(number: int | None, seconds: float, command: list[str], log: Path) -> int:
    """Exit status of a command, to which a signal is sent after a time; None: it is left alone."""
    with log.open("a") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            return process.wait(None if number is None else seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number or 0)
            return process.wait()


def _rows(run: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if not key.startswith(_OF_THE_CLOCK)} for row in rows]


def _tensors(path: Path) -> dict[str, bytes]:
    """The weights to the bit; beside them the file names the layers in an order that is another in each process."""
    return {name: weight.numpy().tobytes() for name, weight in load_file(path).items()}


_COMPARED = {
    "metrics": _rows,
    "held-out scores": lambda run: json.loads((run / "heldout.json").read_text()),
    "exported LoRA": lambda run: _tensors(run / "lora" / "pytorch_lora_weights.safetensors"),
    "last checkpoint": lambda run: _tensors(max((run / "checkpoints").glob("step-*/lora.safetensors"))),
}


if __name__ == "__main__":
    main()

"""The errors that people see as one line, and how a script ends on them."""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class UsageError(ValueError):
    """A wrong argument, file or setting: one sentence that says which, what was expected, what came, and what to do.

    Raised at the boundary, before long work. The scripts print it as one line and exit with status 2; every other
    exception is a defect or a failure of the machine and keeps its traceback.
    """


class Interrupted(Exception):
    """The end of a run that a signal asked for, after all that it had was saved.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by signal {number}")
        self.number = number


@contextmanager
def located(where: str) -> Iterator[None]:
    """Let the sentence of a `UsageError` within the context begin with a place, such as a key or a line of a file."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


@contextmanager
def exit_on_usage_error() -> Iterator[None]:
    """Wrap a script's body: a `UsageError` becomes one line on stderr and exit status 2, without a traceback.

    Of the processes of one launch on this machine only the first prints it. An end by a signal is status 128 + signal.
    """
    try:
        yield
    except UsageError as error:
        if _tell_launcher(f"error: {error}"):
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except Interrupted as stop:
        raise SystemExit(128 + stop.number) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception:
        _tell_launcher(traceback.format_exc().rstrip())
        raise


def _tell_launcher(message: str) -> bool:
    """Leave a message for the launcher to end with; True unless another process of the same launch did so before.

    torchrun, which `accelerate launch` calls for several GPUs, gives each process the name of a file for its error, in
    a folder for each beside those of the others, and ends with the content of the first.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return True
    with suppress(OSError):  # a hint to the launcher, no more
        Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
        try:
            (Path(file).parents[1] / "failed").touch(exist_ok=False)
        except FileExistsError:
            return False
    return True

"""The one kind of error that a user can correct."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """A wrong argument, file or setting: one sentence that says which, what was expected, what came, and what to do.

    Raised at the boundary, before long work. The scripts print it as one line and exit with status 2; every other
    exception is a defect or a failure of the machine and keeps its traceback.
    """


@contextmanager
def exit_on_usage_error() -> Iterator[None]:
    """Around a script's body: a `UsageError` becomes one line on stderr and exit status 2, without a traceback."""
    try:
        yield
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None

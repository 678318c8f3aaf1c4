"""The one kind of error that is the user's to mend."""


class UsageError(ValueError):
    """A wrong argument, file or setting: one sentence that says which, what was expected, what came, and what to do.

    Raised at the boundary, before long work. The scripts print it as one line and exit with status 2; every other
    exception is a defect or a failure of the machine and keeps its traceback.
    """

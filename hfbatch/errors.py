"""Errors that a user meets. Knows nothing of the rest of the package.

Every message names the thing, its value and the fix.
"""

from collections.abc import Sequence


class HfbatchError(Exception):
    """Base of every error that is reported as a message, without a traceback."""


class SpecError(HfbatchError):
    """Something the user asked for cannot work; nothing was started. Carries every fault found.

    :param faults: one sentence a fault, each with what to write instead.
    """

    def __init__(self, faults: Sequence[str] | str) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


class SplitError(HfbatchError):
    """A split cannot be processed (its file is gone, cut off or changed); a rerun tries it again."""


class WorkerError(HfbatchError):
    """No worker can do the job (the model does not load, say), so that going on is of no use."""


class OutputHeldError(HfbatchError):
    """Another process writes to the output now; nothing was started, and a rerun works once that one has ended."""


class LockLostError(WorkerError):
    """Another process has taken over the output, so that this one may write nothing more."""


class NonFiniteOutput(HfbatchError):
    """What a model made of a row holds NaN or infinity; the row becomes a reject."""

"""Errors that a user meets, whose texts tell no secrets. Knows nothing of the rest of the package.

Every message names the thing, its value and the fix.
"""

import re
from collections.abc import Sequence

_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^\s'\"<>]*")
_USER = re.compile(r"((?:https?|s3[an]?)://)[^/@?\s]*@", re.IGNORECASE)
# abfs://container@account is an address, not a secret. A password may hold a slash that nobody encoded.
_PASSWORD = re.compile(r"(://)[^/@?:\s]*:(?!:)(?:[^/\s]*|(?!\d+(?:[/?#]|$))\S*)@")
_SECRET_OPTION = re.compile(
    r"([?&#;][^=&?#\s]*(?:secret|token|passw|pwd|key|credential|sig|auth)[^=&\s]*=)[^&]*", re.IGNORECASE
)


def redact(path: str) -> str:
    """A URL without `user:secret@` and without the values of secret query keys; a path as it is."""
    if "://" not in path:
        return path
    return _SECRET_OPTION.sub(r"\1***", _USER.sub(r"\1", _PASSWORD.sub(r"\1", path)))


def redact_text(text: str) -> str:
    """A text with every URL in it redacted."""
    return _URL_IN_TEXT.sub(lambda found: redact(found.group()), text) if "://" in text else text


class HfbatchError(Exception):
    """Base of every error that is reported as a message, without a traceback and without secrets of URLs."""

    def __init__(self, message: str = "") -> None:
        super().__init__(redact_text(message))


class SpecError(HfbatchError):
    """Something the user asked for cannot work; nothing was started. Carries every fault found.

    :param faults: one sentence a fault, each with what to write instead.
    """

    def __init__(self, faults: Sequence[str] | str) -> None:
        self.faults = [redact_text(fault) for fault in ([faults] if isinstance(faults, str) else faults)]
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

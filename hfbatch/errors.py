"""Errors that are shown to users. Their messages hold no secrets. Imports nothing from the rest of the package.

Every message names the thing, its value and the fix.
"""

import re
from collections.abc import Sequence
from typing import Self

# The scheme is bounded, so that a long text without spaces takes no time that grows with its square.
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]{0,30}://[^\s'\"<>]*")
_USER = re.compile(r"((?:https?|s3[an]?)://)[^/@?\s]*@", re.IGNORECASE)
# abfs://container@account is an address, not a secret. A password may hold a slash that is not encoded.
_PASSWORD = re.compile(r"(://)[^/@?:\s]*:(?!:)(?:[^/\s]*|(?!\d+(?:[/?#]|$))\S*)@")
_SECRET_OPTION = re.compile(
    r"([?&#;][^=&?#\s]*(?:secret|token|passw|pwd|key|credential|sig|auth)[^=&\s]*=)[^&]*", re.IGNORECASE
)


def redact(path: str) -> str:
    """Removes `user:secret@` and the values of secret query keys from a URL; returns a path unchanged."""
    if "://" not in path:
        return path
    return _SECRET_OPTION.sub(r"\1***", _USER.sub(r"\1", _PASSWORD.sub(r"\1", path)))


def redact_text(text: str) -> str:
    """Redacts every URL in a text."""
    return _URL_IN_TEXT.sub(lambda found: redact(found.group()), text) if "://" in text else text


def one_line(error: BaseException) -> str:
    """Returns an exception's message, or else its type: one line of at most 300 characters, without secrets."""
    text = redact_text(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


class HfbatchError(Exception):
    """Base of every error that is reported as a message, without a traceback and without secrets of URLs."""

    def __init__(self, message: str = "") -> None:
        super().__init__(redact_text(message))


class SpecError(HfbatchError):
    """The request of the user cannot work; nothing was started. Holds every fault that was found.

    :param faults: one sentence per fault, each with the fix.
    """

    def __init__(self, faults: Sequence[str] | str) -> None:
        self.faults = [redact_text(fault) for fault in ([faults] if isinstance(faults, str) else faults)]
        super().__init__("\n".join(self.faults))


class SplitError(HfbatchError):
    """A split cannot be processed (its file is missing, truncated or changed); a rerun tries it again."""


class WorkerError(HfbatchError):
    """No worker can run the job, for example because the model does not load; the job stops."""


class OutputHeldError(HfbatchError):
    """Another process is writing to the output; nothing was started. Run again after that process has ended."""


class LockLostError(WorkerError):
    """Another process has taken over the output; this one must not write to it any more."""


class NonFiniteOutput(HfbatchError):
    """The output of a model for a row holds NaN or infinity; the row becomes a reject."""

    @classmethod
    def of(cls, what: str, dtype: str) -> Self:
        """Names the output, and the likely cause. :param dtype: the model's dtype."""
        hint = (
            "numbers above 65,504 overflow in float16; set model.dtype to bfloat16 or float32"
            if dtype == "float16"
            else f"the model ran in {dtype}: check whether its weights hold NaN"
        )
        return cls(f"{what} is NaN or infinite; {hint}")

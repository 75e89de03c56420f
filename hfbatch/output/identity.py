"""The identity of a job or a training: its digest, and the differences of two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from hfbatch.output import results_version


def digest(identity: Mapping[str, Any]) -> str:
    """Returns the fingerprint of an identity: 32 hexadecimal digits."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Returns the settings in which two identities differ, by full name, each as `seed (there: 0, now: 7)`.

    The version of results is not compared: `results_version.version_fault` reports it.
    """
    return {name: text for name, text in _differing(there, now) if name != results_version.KEY}


def _differing(there: Any, now: Any, where: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        for key in {**there, **now}:
            yield from _differing(there.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif there != now:
        yield where, f"{where} (there: {there!r}, now: {now!r})"

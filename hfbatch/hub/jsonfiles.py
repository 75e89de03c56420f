"""Reads JSON files of a model folder, and recognises Git LFS pointers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_POINTER = b"version https://git-lfs.github.com/spec/"
MOST_BYTES = 256 << 20
"""Largest JSON file that is read; tokenizers have 40 MB at most."""


def is_pointer(path: Path) -> bool:
    """Returns whether a file is a Git LFS pointer, left in place of a file that was not downloaded."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def pointer_fault(model: str, name: str) -> str:
    """Returns the error message for a Git LFS pointer."""
    return (
        f"model {model!r}: {name} is a Git LFS pointer in place of the file; run `git lfs pull` in the folder, or download "
        "the model again"
    )


def read_json(path: Path) -> Any:
    """Reads a JSON file. :raises ValueError: if it is not JSON, too large or nested too deeply."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path.stat().st_size:,} bytes, more than {MOST_BYTES:,}")
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(path: Path) -> dict[str, Any] | None:
    """Reads a file that holds a JSON object; returns None for any other file, or if there is none."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None

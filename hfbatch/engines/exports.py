"""The cache of exported models: a folder for each model, set of inputs, and versions of the libraries."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hfbatch._version import __version__

KEY = "hfbatch_export.json"
"""File with what an export was made of."""
SCRATCH = ".making"
"""Ending of the folder in which an export is made, beside the lock of the process that makes it."""


def cached_export(key: Mapping[str, Any], packages: tuple[str, ...], export: Callable[[Path], None]) -> Path:
    """Returns the folder of an export; makes it if this machine does not have it.

    Processes that need the same export wait for the first of them. A folder appears only when it is complete.

    :param key: JSON values that determine the export.
    :param packages: distributions whose versions do so too, besides hfbatch itself.
    :param export: writes the files to an empty folder.
    """
    from filelock import FileLock

    versions = {"hfbatch": __version__} | {name: version(name) for name in packages}
    whole = {**key, "versions": versions}
    text = json.dumps(whole, sort_keys=True)
    folder = cache_folder()
    target = folder / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            _remove_left_ones(folder)
            scratch = target.with_suffix(SCRATCH)
            shutil.rmtree(scratch, ignore_errors=True)
            made = scratch / "export"
            made.mkdir(parents=True)
            try:
                export(made)
                (made / KEY).write_text(text, encoding="utf8")
                os.rename(made, target)
            finally:
                shutil.rmtree(scratch)
    return target


def _remove_left_ones(folder: Path) -> None:
    """Removes what exports have left that were killed: no process holds their locks."""
    from filelock import FileLock, Timeout

    for left in folder.glob(f"*{SCRATCH}"):
        with suppress(Timeout), FileLock(left.with_suffix(".lock"), blocking=False):
            shutil.rmtree(left, ignore_errors=True)


def cache_folder() -> Path:
    """Returns the folder of all exports: `HFBATCH_CACHE`, or one below that of the Hub's libraries, `HF_HOME`."""
    from huggingface_hub import cached_assets_path

    return cached_assets_path("hfbatch", "exports", assets_dir=os.environ.get("HFBATCH_CACHE"))


def cached_exports() -> dict[Path, dict[str, Any]]:
    """Returns what each export in the cache was made of, by its folder, newest last."""
    keys = sorted(cache_folder().glob(f"*/{KEY}"), key=lambda path: path.stat().st_mtime)
    return {path.parent: _read_key(path) for path in keys}


def _read_key(path: Path) -> dict[str, Any]:
    try:
        key: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
    except ValueError:  # of a machine that lost power: the folder is listed, and can be deleted
        return {"engine": "unreadable", "model": "", "auto_class": ""}
    return key

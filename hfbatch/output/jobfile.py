"""Reads the files beside the rows of an output, also where the version before kept them."""

from __future__ import annotations

import json
from typing import Any

import pyarrow.fs as pafs

from hfbatch.data.filesystem import Location, open_filesystem
from hfbatch.errors import SpecError, SplitError, redact
from hfbatch.output.layout import JOB, before


def read_file(fs: pafs.FileSystem, root: str, name: str) -> bytes | None:
    """Reads a file of an output, named as in `layout`; returns None if there is none."""
    for place in dict.fromkeys((name, before(name))):
        try:
            with fs.open_input_stream(f"{root}/{place}") as stream:
                return stream.read()
        except FileNotFoundError:
            continue
    return None


def read_job(out: str) -> dict[str, Any] | None:
    """Reads job.json of an output; returns None if there is none. :raises SplitError: if it is not JSON."""
    data = read_file(*open_filesystem(out), JOB)
    try:
        return None if data is None else json.loads(data)
    except ValueError as error:
        raise SplitError(
            f"{redact(out)}/{JOB} is not JSON ({error}); use --overwrite to start again"
        ) from error


def require_job(out: str) -> dict[str, Any]:
    """Reads job.json of an output. :raises SpecError: if there is none."""
    job = read_job(out)
    if job is None:
        raise SpecError(f"{Location(out)} is not an output of hfbatch: it has no {JOB}")
    return job


def is_training(job: dict[str, Any] | None) -> bool:
    """Returns whether the content of a job.json is that of a fine-tuning."""
    return isinstance(job, dict) and "train" in (job.get("spec") or {})

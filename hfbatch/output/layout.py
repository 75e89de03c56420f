"""The names of all files of an output, and those that the version before gave them.

    OUT/part-….parquet                  the rows: the only names that end in .parquet
    OUT/_SUCCESS                        written last: Parquet without rows, since `datasets` reads it with a data_dir
    OUT/__hfbatch/job.json …            everything else
    OUT/__hfbatch/rejects/part-….PARQUET

Every reader finds the parts alone. Spark, pyarrow and Ray skip folders that begin with `_`, `datasets` those that begin
with `__`. DuckDB skips none, but its `**/*.parquet` does not match the upper-case ending, which all readers accept as
Parquet when they are given the folder of rejects.
"""

from __future__ import annotations

import re

from hfbatch.data.splits import part_name
from hfbatch.data.walk import INNER, OLD_INNER

SUCCESS = "_SUCCESS"
JOB = f"{INNER}/job.json"
MANIFESTS = f"{INNER}/manifests.PARQUET"
REJECTS = f"{INNER}/rejects"
ERRORS = f"{INNER}/errors"
REPORT, REPORT_PAGE = f"{INNER}/report.json", f"{INNER}/report.html"
CHECKPOINTS = f"{INNER}/checkpoints"
TEMPORARY_END = ".hfbatch-tmp"
"""Ending of a file that is being written; its name begins with a dot."""

_PART = re.compile(r"part-.*-[0-9a-f]{12}-[0-9a-f]{12}\.parquet")
_LOCK = re.compile(r"lock-(\d{8,})\.json")


def is_part(name: str) -> bool:
    """Returns whether a name in an output is that of a part."""
    return _PART.fullmatch(name) is not None


def is_temporary(name: str) -> bool:
    """Returns whether a name is that of a file that a writer has not finished."""
    return name.startswith(".") and name.endswith(TEMPORARY_END)


def lock_file(number: int) -> str:
    """Returns the name of a lock file in the inner folder."""
    return f"lock-{number:08d}.json"


def lock_number(name: str) -> int:
    """Returns the number of a lock file; 0 for any other name."""
    match = _LOCK.fullmatch(name)
    return int(match[1]) if match else 0


def rejects_of(part: str) -> str:
    """Returns the file of the rejects of a part."""
    return f"{REJECTS}/{_upper(part)}"


def part_of(rejects: str) -> str:
    """Returns the part of a file of rejects."""
    return rejects.replace(".PARQUET", ".parquet")


def before(name: str) -> str:
    """Returns where the version before kept a file or folder of the inner folder."""
    return name.replace(INNER, OLD_INNER, 1).replace(".PARQUET", ".parquet")


def after(name: str) -> str:
    """Returns the present place of a file that the version before wrote to the inner folder."""
    moved = name.replace(OLD_INNER, INNER, 1)
    ours = moved.startswith(f"{REJECTS}/") or moved == part_of(MANIFESTS)
    return _upper(part_name(moved)) if ours else moved


def _upper(name: str) -> str:
    return name.removesuffix(".parquet") + ".PARQUET" if name.endswith(".parquet") else name

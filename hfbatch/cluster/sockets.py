"""Checks that the paths of Ray's sockets are short enough for the system. Starts nothing."""

from __future__ import annotations

import os

from hfbatch.errors import SpecError

MOST_BYTES = 107
"""Longest path of a socket on Linux; see unix(7)."""
BELOW = len(f"/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store")
"""Bytes that Ray adds to the path of the folder of a cluster that this process starts."""


def check_sockets(folder: str) -> None:
    """Checks that a cluster can have its files in a folder.

    :raises SpecError: if the paths of its sockets would be too long, which Ray reports late and as a traceback.
    """
    size = len(os.fsencode(folder))
    if size + BELOW > MOST_BYTES:
        where = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "the temporary folder"
        raise SpecError(
            f"{where}: a Ray cluster for this job would have its files in {folder} ({size} bytes), and the paths of "
            f"its sockets would be longer than the {MOST_BYTES} bytes that the system allows; set RAY_TMPDIR to a folder "
            f"with a path of at most {MOST_BYTES - BELOW - len('/hfbatch-12345678/hfbatch-')} bytes, such as /tmp"
        )

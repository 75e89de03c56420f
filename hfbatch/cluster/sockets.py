"""Whether the paths of Ray's sockets fit into what the system takes. Starts nothing."""

from __future__ import annotations

import os

from hfbatch.errors import SpecError

MOST_BYTES = 107
"""Of a socket's path, on Linux; see unix(7)."""
BELOW = len(f"/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store")
"""Bytes that Ray adds to the folder of a cluster that this process starts."""


def check_sockets(folder: str) -> None:
    """Whether a cluster can have its files in a folder.

    :raises SpecError: where the paths of its sockets would be too long, for which Ray has a traceback after a while.
    """
    size = len(os.fsencode(folder))
    if size + BELOW > MOST_BYTES:
        where = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "the temporary folder"
        raise SpecError(
            f"{where}: a Ray cluster of this job's own would have its files in {folder} ({size} bytes), and the paths of "
            f"its sockets would be longer than the {MOST_BYTES} bytes that the system takes; set RAY_TMPDIR to a folder "
            f"with a path of at most {MOST_BYTES - BELOW - len('/hfbatch-12345678/hfbatch-')} bytes, such as /tmp"
        )

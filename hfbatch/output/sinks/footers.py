"""Reads the footers of parts, once for each version of a part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from hfbatch.data.filesystem import READ_ERRORS, is_local, one_line
from hfbatch.data.splits import Split, part_name
from hfbatch.errors import SplitError
from hfbatch.output.manifest import Manifest
from hfbatch.output.writer import FOOTER_KEY

LOCAL_THREADS, REMOTE_THREADS = 16, 64
Version = tuple[int, int]
"""Size in bytes and modification time in nanoseconds of a file, from a listing."""
UNKNOWN: Version = (0, 0)
"""Version of a file that is not in the listing. A time of 0 means that the listing has no times."""
_SCHEMA = pa.schema(
    [
        ("part", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("fingerprint", pa.string()),
        ("rows", pa.int64()),
        ("manifest", pa.string()),
    ]
)


@dataclass
class Footer:
    """The content of a part as its footer states it."""

    fingerprint: str
    rows: int
    """Rows of the Parquet file itself."""
    manifest: Manifest
    """If the footer cannot be read, `error` says why."""

    def fault(self, part: str, fingerprint: str) -> str | None:
        """Checks that the part is that of this split and job, and complete; returns the fault or None."""
        footer = self.manifest
        if self.fingerprint != fingerprint:
            return f"{part} is of another job: its fingerprint is {self.fingerprint}, not {fingerprint}"
        if footer.part != part:
            return f"{part} is a copy of {footer.part}, which has other rows"
        if self.rows != footer.rows_out or footer.rows_in != footer.rows_out + footer.rows_rejected:
            return (
                f"{part} does not hold what its footer says: {self.rows:,} rows; {footer.rows_in:,} came in, "
                f"{footer.rows_out:,} went out, {footer.rows_rejected:,} were rejected"
            )
        return None


class Footers:
    """The footers of an output's parts.

    A footer that was read before is used again if the part's size and modification time in the listing are unchanged:
    parts are only replaced whole, so that this is the same file.

    :param path: returns the path of a part on the filesystem.
    """

    def __init__(self, fs: pafs.FileSystem, path: Callable[[str], str]) -> None:
        self._fs, self._path = fs, path
        self._known: dict[str, tuple[Version, Footer]] = {}

    def of(self, parts: Mapping[str, Version]) -> dict[str, Footer]:
        """Returns the footer of each part in a listing; reads those that are not known in parallel."""
        unread = [part for part, version in parts.items() if not self._is_known(part, version)]
        threads = LOCAL_THREADS if is_local(self._fs) else REMOTE_THREADS
        with ThreadPoolExecutor(threads) as pool:
            for part, footer in zip(unread, pool.map(self._read, unread), strict=True):
                self._known[part] = parts[part], footer
        return {part: self._known[part][1] for part in parts}

    def note(self, manifests: Iterable[Manifest]) -> None:
        """Adds workers' manifests of parts that they wrote, which hold more than footers, such as seconds of writing.

        A manifest is used if its part and counts are those of the footer.
        """
        for reported in manifests:
            _, footer = self._known.get(reported.part, (None, None))
            if footer is not None and _counts(footer.manifest) == _counts(reported):
                footer.manifest = reported

    def load(self, data: bytes) -> None:
        """Loads the result of `dump`; ignores data that cannot be read or has an earlier format."""
        try:
            rows = pq.read_table(pa.BufferReader(data)).select(_SCHEMA.names).to_pylist()
        except (*READ_ERRORS, KeyError):
            return
        for row in rows:
            footer = Footer(row["fingerprint"], row["rows"], Manifest.from_json(row["manifest"]))
            self._known.setdefault(row["part"], ((row["size"], row["mtime_ns"]), footer))

    def dump(self, parts: Iterable[str]) -> pa.Buffer:
        """Serializes the footers of parts as Parquet, except those that cannot be read."""
        kept = [(part, *self._known[part]) for part in parts if part in self._known]
        rows = [
            {
                "part": part, "size": version[0], "mtime_ns": version[1], "fingerprint": footer.fingerprint,
                "rows": footer.rows, "manifest": footer.manifest.to_json(),
            }
            for part, version, footer in kept
            if footer.manifest.error is None
        ]  # fmt: skip
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), sink)
        return sink.getvalue()

    def _is_known(self, part: str, version: Version) -> bool:
        found = self._known.get(part)
        return (
            found is not None and found[0] == version and version[1] != 0 and found[1].manifest.error is None
        )

    def _read(self, part: str) -> Footer:
        try:
            values, rows = read_footer(self._fs, self._path(part), part)
            return Footer(values["fingerprint"], rows, Manifest(**values["manifest"]))
        except SplitError as error:
            return Footer("", 0, Manifest(part, error=str(error)))


def read_footer(fs: pafs.FileSystem, path: str, part: str) -> tuple[dict[str, Any], int]:
    """Reads the footer of a part (split, manifest, fingerprint, model commit), and its number of rows.

    :param part: name of the part, for messages.

    :raises SplitError: if it cannot be read or was not written by hfbatch.
    """
    try:
        with fs.open_input_file(path) as file, pq.ParquetFile(file) as opened:
            found = opened.metadata
        values = json.loads((found.metadata or {})[FOOTER_KEY.encode()])
        Manifest(**values["manifest"]), Split.from_dict(values["split"]), values["fingerprint"]
        values["manifest"]["part"] = part_name(values["manifest"]["part"])
        return values, found.num_rows
    except (KeyError, TypeError) as error:
        raise SplitError(
            f"{part} was not written by hfbatch: its footer has no {FOOTER_KEY!r} key that describes a part"
        ) from error
    except READ_ERRORS as error:
        raise SplitError(f"{part} cannot be read: {one_line(error)}; delete it and run again") from error


def _counts(manifest: Manifest) -> tuple[str, int, int, int, int]:
    return manifest.part, manifest.rows_read, manifest.rows_in, manifest.rows_out, manifest.rows_rejected

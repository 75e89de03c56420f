"""What is done: the output folder itself, read by names. Knows nothing of how parts come about."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hfbatch.data.filesystem import (
    READ_ERRORS,
    Location,
    is_local,
    kind_of,
    list_names,
    one_line,
    open_filesystem,
    redact,
    stat_file,
)
from hfbatch.data.manifest import Manifest
from hfbatch.data.splits import Split
from hfbatch.data.writer import FOOTER_KEY, REJECTS_FOLDER, TEMPORARY_END, write_file
from hfbatch.errors import SplitError

THREADS = 16
FOLDER = "_hfbatch"
JOB = f"{FOLDER}/job.json"
MANIFESTS = f"{FOLDER}/manifests.parquet"
SUCCESS = "_SUCCESS"
PART_NAME = re.compile(r"part-.*-[0-9a-f]{12}-[0-9a-f]{12}\.parquet")


@dataclass(frozen=True)
class State:
    """A plan's splits against the parts that are there."""

    done: list[Split]
    todo: list[Split]
    stale: list[str]
    """Parts of no split of the plan, sorted: their input changed, went away or is cut otherwise."""


class Ledger:
    """The committed parts of an output folder, and the few files about the job beside them.

    :param out: the output folder, a path or URL; it need not exist.
    :raises SpecError: when nothing can open such a path.
    """

    def __init__(self, out: str) -> None:
        self.out = Location(out)
        self.fs, self.root = open_filesystem(out)

    def list_parts(self) -> set[str]:
        """Names of all parts, from one listing."""
        return {
            name for name, folder in list_names(self.fs, self.root).items() if not folder and _is_part(name)
        }

    def state(self, splits: Sequence[Split]) -> State:
        """Compares splits with parts by name alone; no footer is read."""
        there = self.list_parts()
        done: list[Split] = []
        todo: list[Split] = []
        for split in splits:
            part = split.part
            (done if part in there else todo).append(split)
            there.discard(part)
        return State(done, todo, sorted(there))

    def foreign(self) -> list[str]:
        """Names in the folder that hfbatch did not write, sorted, without those that begin `_` or `.`."""
        names = list_names(self.fs, self.root).items()
        return sorted(
            name for name, folder in names if name[0] not in "_." and (folder or not _is_part(name))
        )

    def remove(self, parts: Collection[str]) -> None:
        """Deletes parts, then their rejects. :raises OSError: when one cannot be deleted."""
        rejects = list_names(self.fs, f"{self.root}/{REJECTS_FOLDER}")

        def remove_one(part: str) -> None:
            self._delete(part)
            if part in rejects:
                self._delete(f"{REJECTS_FOLDER}/{part}")

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(remove_one, parts))

    def rejects_without_part(self, parts: Collection[str]) -> list[str]:
        """Names of reject files whose part was never committed, or went away, sorted. :param parts: all parts."""
        there = list_names(self.fs, f"{self.root}/{REJECTS_FOLDER}")
        return sorted({name for name in there if _is_part(name)} - set(parts))

    def remove_rejects(self, names: Collection[str]) -> None:
        """Deletes reject files. :raises OSError: when one cannot be deleted."""
        for name in names:
            self._delete(f"{REJECTS_FOLDER}/{name}")

    def clear(self) -> None:
        """Deletes what hfbatch wrote, nothing else; job.json goes last: a clear cut off can be repeated."""
        self.clear_success()
        self.remove(self.list_parts())
        self.clean_temporary()
        if kind_of(self.fs, f"{self.root}/{FOLDER}") == "folder":
            for name, folder in list_names(self.fs, f"{self.root}/{FOLDER}").items():
                path = f"{self.root}/{FOLDER}/{name}"
                if folder:
                    self.fs.delete_dir(path)
                elif f"{FOLDER}/{name}" != JOB:
                    self._delete(f"{FOLDER}/{name}")
            self.fs.delete_dir(f"{self.root}/{FOLDER}")

    def read_job(self) -> dict[str, Any] | None:
        """What job.json says; None where there is none. :raises SplitError: when it is not JSON."""
        data = self._read(JOB)
        try:
            return None if data is None else json.loads(data)
        except ValueError as error:
            raise SplitError(
                f"{redact(self.out)}/{JOB} is not JSON ({error}); use --overwrite to start anew"
            ) from error

    def write_job(self, job: dict[str, Any]) -> None:
        """Writes job.json. :raises OSError: when it cannot."""
        write_file(self.fs, f"{self.root}/{JOB}", json.dumps(job, indent=2).encode())

    def mark_success(self, summary: dict[str, Any]) -> None:
        """Writes _SUCCESS, the last of all files. :raises OSError: when it cannot."""
        write_file(self.fs, f"{self.root}/{SUCCESS}", json.dumps(summary).encode())

    def clear_success(self) -> None:
        """Removes _SUCCESS where it is."""
        self._delete(SUCCESS)

    def has_success(self) -> bool:
        """Whether the job ended well."""
        return stat_file(self.fs, f"{self.root}/{SUCCESS}") is not None

    def clean_temporary(self) -> None:
        """Removes what killed writers left; object stores keep nothing of an upload that was cut off."""
        if not is_local(self.fs):
            return
        for folder in (self.root, f"{self.root}/{FOLDER}", f"{self.root}/{REJECTS_FOLDER}"):
            for name in list_names(self.fs, folder):
                if name.startswith(".") and name.endswith(TEMPORARY_END):
                    with suppress(FileNotFoundError):
                        os.unlink(f"{folder}/{name}")

    def check_writable(self) -> str | None:
        """What keeps the folder from being written, in words, or None; leaves nothing behind."""
        shown = redact(self.out)
        probe = f"{self.root}/{FOLDER}/.probe-{uuid.uuid4().hex}"
        made = _absent_folders(f"{self.root}/{FOLDER}") if is_local(self.fs) else []
        try:
            if kind_of(self.fs, self.root) == "file":
                return f"output {shown} is a file; give a folder"
            write_file(self.fs, probe, b"hfbatch")
            self.fs.delete_file(probe)
        except OSError as error:
            return f"output {shown} cannot be written: {one_line(error)}; give a folder that you may write"
        finally:
            for folder in made:
                with suppress(OSError):
                    os.rmdir(folder)
        return None

    def read_footer(self, part: str) -> dict[str, Any]:
        """What a part says of itself: split, manifest, fingerprint, model commit.

        :raises SplitError: when it cannot be read or hfbatch did not write it.
        """
        try:
            metadata = pq.read_metadata(f"{self.root}/{part}", filesystem=self.fs).metadata or {}
            return json.loads(metadata[FOOTER_KEY.encode()])
        except KeyError as error:
            raise SplitError(
                f"{part} was not written by hfbatch: its footer has no {FOOTER_KEY!r} key"
            ) from error
        except READ_ERRORS as error:
            raise SplitError(f"{part} cannot be read: {one_line(error)}; delete it and run again") from error

    def manifests(self, parts: Iterable[str], fresh: Iterable[Manifest] = ()) -> list[Manifest]:
        """The manifest of each part, in order: cached, or from its footer; a damaged part gives its error.

        :param fresh: those of parts that were just written, which go before the cache.
        """
        wanted = list(parts)
        known = {part: Manifest.from_json(text) for part, text in self._cached().items()}
        known |= {manifest.part: manifest for manifest in fresh}
        missing = [part for part in wanted if part not in known]
        with ThreadPoolExecutor(THREADS) as pool:
            known |= zip(missing, pool.map(self._manifest, missing), strict=True)
        return [known[part] for part in wanted]

    def forget(self, parts: Iterable[str]) -> None:
        """Drops parts from the cache that are to be written again. :raises OSError: when it cannot."""
        cached, gone = self._cached(), set(parts)
        if gone & cached.keys():
            self.save_manifests(
                [Manifest.from_json(text) for part, text in cached.items() if part not in gone]
            )

    def save_manifests(self, manifests: Sequence[Manifest]) -> None:
        """Writes the cache that spares the next run the footers. :raises OSError: when it cannot."""
        columns = {"part": [m.part for m in manifests], "manifest": [m.to_json() for m in manifests]}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, pa.schema([("part", pa.string()), ("manifest", pa.string())])), sink)
        write_file(self.fs, f"{self.root}/{MANIFESTS}", sink.getvalue())

    def _manifest(self, part: str) -> Manifest:
        try:
            return Manifest(**self.read_footer(part)["manifest"])
        except SplitError as error:
            return Manifest(part, error=str(error))

    def _cached(self) -> dict[str, str]:
        data = self._read(MANIFESTS)
        if data is None:
            return {}
        try:
            table = pq.read_table(pa.BufferReader(data), columns=["part", "manifest"])
        except READ_ERRORS:
            return {}  # The cache only saves time: the footers say the same.
        return dict(zip(table["part"].to_pylist(), table["manifest"].to_pylist(), strict=True))

    def _read(self, name: str) -> bytes | None:
        try:
            with self.fs.open_input_stream(f"{self.root}/{name}") as stream:
                return stream.read()
        except FileNotFoundError:
            return None

    def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.fs.delete_file(f"{self.root}/{name}")


def types_of(schema: pa.Schema) -> dict[str, str]:
    """Column names and types as text. Parquet renames the items of lists, so their name does not count."""
    return {field.name: str(field.type).replace("<item: ", "<element: ") for field in schema}


def _is_part(name: str) -> bool:
    return PART_NAME.fullmatch(name) is not None


def _absent_folders(path: str) -> list[str]:
    """The folder and those above it that do not exist, innermost first."""
    absent = []
    while path and path != "/" and not os.path.lexists(path):
        absent.append(path)
        path = os.path.dirname(path)
    return absent

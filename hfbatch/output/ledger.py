"""The ledger of an output folder: which splits are done, by the names of its parts."""

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
import pyarrow.fs as pafs

from hfbatch.data.filesystem import (
    Location,
    absent_folders,
    is_local,
    kind_of,
    list_names,
    list_versions,
    one_line,
    open_filesystem,
    redact,
    stat_file,
)
from hfbatch.data.splits import Split
from hfbatch.errors import SplitError
from hfbatch.output.footers import UNKNOWN, Footers, Version, read_footer
from hfbatch.output.lock import Claim, is_lock
from hfbatch.output.manifest import Manifest
from hfbatch.output.writer import REJECTS_FOLDER, TEMPORARY_END, write_file

THREADS = 16
FOLDER = "_hfbatch"
JOB = f"{FOLDER}/job.json"
MANIFESTS = f"{FOLDER}/manifests.parquet"
SUCCESS = "_SUCCESS"
PART_NAME = re.compile(r"part-.*-[0-9a-f]{12}-[0-9a-f]{12}\.parquet")


@dataclass(frozen=True)
class State:
    """The splits of a plan compared with the parts in the output."""

    done: list[Split]
    todo: list[Split]
    stale: list[str]
    """Parts of no split of the plan, sorted: their input was changed, removed or split differently."""


class Ledger:
    """The committed parts of an output folder, and the files about the job beside them.

    :param out: the output folder, a path or URL; it need not exist.
    :raises SpecError: if no filesystem can open the path.
    """

    def __init__(self, out: str) -> None:
        self.out = Location(out)
        self.fs, self.root = open_filesystem(out)
        self.claim: Claim | None = None
        """The hold on the output that is checked before each change; None for no check."""
        self._read_before: Footers | None = None

    def list_parts(self) -> set[str]:
        """Returns the names of all parts, from one listing."""
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
        """Returns the sorted names that hfbatch did not write in the folder, except those that begin `_` or `.`."""
        names = list_names(self.fs, self.root).items()
        return sorted(
            name for name, folder in names if name[0] not in "_." and (folder or not _is_part(name))
        )

    def remove(self, parts: Collection[str]) -> None:
        """Deletes parts, then their rejects. :raises OSError: if one cannot be deleted."""
        self._check()
        rejects = list_names(self.fs, f"{self.root}/{REJECTS_FOLDER}")

        def remove_one(part: str) -> None:
            self._delete(part)
            if part in rejects:
                self._delete(f"{REJECTS_FOLDER}/{part}")

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(remove_one, parts))

    def rejects_without_part(self, parts: Collection[str]) -> list[str]:
        """Returns the sorted names of reject files whose part does not exist. :param parts: all parts."""
        there = list_names(self.fs, f"{self.root}/{REJECTS_FOLDER}")
        return sorted({name for name in there if _is_part(name)} - set(parts))

    def remove_rejects(self, names: Collection[str]) -> None:
        """Deletes reject files. :raises OSError: when one cannot be deleted."""
        self._check()
        for name in names:
            self._delete(f"{REJECTS_FOLDER}/{name}")

    def clear(self) -> None:
        """Deletes hfbatch's files except locks; job.json last, so that an interrupted clear can be repeated."""
        self.clear_success()
        self.remove(self.list_parts())
        self.clean_temporary()
        clear_folder(self.fs, f"{self.root}/{FOLDER}")
        self._read_before = None

    def read_job(self) -> dict[str, Any] | None:
        """Reads job.json; returns None if there is none. :raises SplitError: if it is not JSON."""
        data = self._read(JOB)
        try:
            return None if data is None else json.loads(data)
        except ValueError as error:
            raise SplitError(
                f"{redact(self.out)}/{JOB} is not JSON ({error}); use --overwrite to start again"
            ) from error

    def holds_training(self) -> bool:
        """Returns whether job.json is that of a fine-tuning."""
        try:
            job = json.loads(self._read(JOB) or b"{}")
        except ValueError:
            return False
        return isinstance(job, dict) and "train" in (job.get("spec") or {})

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Writes a file of the output atomically. :raises OSError: if it cannot be written."""
        write_file(self.fs, f"{self.root}/{name}", data, self._check)

    def write_job(self, job: dict[str, Any]) -> None:
        """Writes job.json. :raises OSError: if it cannot be written."""
        self.write(JOB, json.dumps(job, indent=2).encode())

    def mark_success(self, summary: dict[str, Any]) -> None:
        """Writes _SUCCESS, the last of all files. :raises OSError: if it cannot be written."""
        self.write(SUCCESS, json.dumps(summary).encode())

    def clear_success(self) -> None:
        """Removes _SUCCESS if it exists."""
        self._check()
        self._delete(SUCCESS)

    def has_success(self) -> bool:
        """Returns whether the job succeeded."""
        return stat_file(self.fs, f"{self.root}/{SUCCESS}") is not None

    def clean_temporary(self) -> None:
        """Removes temporary files of killed writers; object stores keep nothing of an interrupted upload.

        Only for the holder of the output: a writer that lost it then has nothing left to rename.
        """
        if not is_local(self.fs):
            return
        self._check()
        for folder in (self.root, f"{self.root}/{FOLDER}", f"{self.root}/{REJECTS_FOLDER}"):
            for name in list_names(self.fs, folder):
                if name.startswith(".") and name.endswith(TEMPORARY_END):
                    with suppress(FileNotFoundError):
                        os.unlink(f"{folder}/{name}")

    def check_writable(self) -> str | None:
        """Checks that the folder can be written; returns the fault or None. Leaves no files behind."""
        shown = redact(self.out)
        probe = f"{self.root}/{FOLDER}/.probe-{uuid.uuid4().hex}"
        made = absent_folders(f"{self.root}/{FOLDER}") if is_local(self.fs) else []
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
        """Reads the footer of a part: split, manifest, fingerprint, model commit.

        :raises SplitError: if it cannot be read or was not written by hfbatch.
        """
        return read_footer(self.fs, self.root, part)[0]

    def manifests(self, parts: Iterable[str] | None = None) -> list[Manifest]:
        """Returns the manifest of each part, in order, from its footer; a footer that cannot be read gives its error.

        :param parts: default: all parts of one listing, sorted.
        """
        there = self._listing()
        wanted = sorted(there) if parts is None else list(parts)
        found = self._footers().of({part: there.get(part, UNKNOWN) for part in wanted})
        return [found[part].manifest for part in wanted]

    def audit(
        self, splits: Sequence[Split], fingerprint: str, fresh: Iterable[Manifest] = ()
    ) -> tuple[State, list[Manifest], dict[str, str]]:
        """Compares splits with one listing and the footers of the parts, and with nothing else.

        A part of another job, or whose rows or rejects differ from its footer, counts as not done. A part that cannot
        be read counts as done, with its error: it may be complete, on a failing disk.

        :param fresh: manifests of parts that were just written.
        :returns: the state; the manifests of the splits done, in order; the faults of existing parts that are not done.
        """
        there = self._listing()
        rejects = list_names(self.fs, f"{self.root}/{REJECTS_FOLDER}")
        wanted = {split.part for split in splits}
        footers = self._footers()
        found = footers.of({part: version for part, version in there.items() if part in wanted})
        footers.note(fresh)
        done: list[Split] = []
        todo: list[Split] = []
        wrong: dict[str, str] = {}
        for split in splits:
            footer = found.get(split.part)
            fault = None
            if footer is not None and footer.manifest.error is None:
                fault = footer.fault(split.part, fingerprint)
                if footer.manifest.rows_rejected and split.part not in rejects:
                    fault = fault or f"the rejects of {split.part} are missing"
            if fault:
                wrong[split.part] = fault
            (todo if footer is None or fault else done).append(split)
        state = State(done, todo, sorted(there.keys() - wanted))
        return state, [found[split.part].manifest for split in done], wrong

    def save_manifests(self, fresh: Iterable[Manifest] = ()) -> None:
        """Writes the content of the footers to one file for the next run. :raises OSError: if it cannot be written.

        :param fresh: manifests of parts that were just written.
        """
        there, footers = self._listing(), self._footers()
        footers.of(there)
        footers.note(fresh)
        self.write(MANIFESTS, footers.dump(there))

    def _footers(self) -> Footers:
        if self._read_before is None:
            self._read_before = Footers(self.fs, self.root)
            data = self._read(MANIFESTS)
            if data is not None:
                self._read_before.load(data)
        return self._read_before

    def _listing(self) -> dict[str, Version]:
        """Returns the names of all parts with their sizes and times, from one listing."""
        return {
            name: version for name, version in list_versions(self.fs, self.root).items() if _is_part(name)
        }

    def _check(self) -> None:
        if self.claim is not None:
            self.claim.check()

    def _read(self, name: str) -> bytes | None:
        try:
            with self.fs.open_input_stream(f"{self.root}/{name}") as stream:
                return stream.read()
        except FileNotFoundError:
            return None

    def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.fs.delete_file(f"{self.root}/{name}")


def clear_folder(fs: pafs.FileSystem, root: str) -> None:
    """Deletes the content of a `_hfbatch` folder except the lock; job.json last, since it identifies the owner."""
    for name, folder in sorted(list_names(fs, root).items(), key=lambda entry: entry[0] == "job.json"):
        with suppress(FileNotFoundError):
            if folder:
                fs.delete_dir(f"{root}/{name}")
            elif not is_lock(name):
                fs.delete_file(f"{root}/{name}")
    if kind_of(fs, root) == "folder" and not list_names(fs, root):
        fs.delete_dir(root)


def types_of(schema: pa.Schema) -> dict[str, str]:
    """Returns column names and types as text. Names of list items are ignored, since Parquet changes them."""
    return {field.name: str(field.type).replace("<item: ", "<element: ") for field in schema}


def _is_part(name: str) -> bool:
    return PART_NAME.fullmatch(name) is not None

"""The ledger of an output folder: which splits are done, by the names of its parts."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
from hfbatch.data.formats.columns import empty_table
from hfbatch.data.splits import part_name
from hfbatch.errors import SplitError
from hfbatch.output.jobfile import is_training, read_job
from hfbatch.output.layout import (
    ERRORS,
    INNER,
    JOB,
    REJECTS,
    SUCCESS,
    before,
    is_part,
    is_temporary,
    lock_number,
    part_of,
    rejects_of,
)
from hfbatch.output.lock import Claim
from hfbatch.output.writer import FOOTER_KEY, part_table_bytes, write_file

THREADS = 16


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
        self._stored: dict[str, str] = {}
        """Files of parts that the version before gave another name."""

    def list_parts(self) -> set[str]:
        """Returns the names of all parts, from one listing."""
        names = list_names(self.fs, self.root).items()
        return set(self._named(name for name, folder in names if not folder))

    def list_versions(self) -> dict[str, tuple[int, int]]:
        """Returns the names of all parts with their sizes and times, from one listing."""
        versions = list_versions(self.fs, self.root)
        return {part: versions[name] for part, name in self._named(versions).items()}

    def path(self, part: str) -> str:
        """Returns the path of a part on the filesystem; the part is from a listing by this ledger."""
        return f"{self.root}/{self._stored.get(part, part)}"

    def rejects(self) -> dict[str, str]:
        """Returns the path of the file of rejects of each part that has one, from one listing."""
        for folder in (REJECTS, before(REJECTS)):
            found = {
                part_name(part_of(name)): f"{self.root}/{folder}/{name}"
                for name in list_names(self.fs, f"{self.root}/{folder}")
            }
            if found:
                break
        return {part: path for part, path in found.items() if is_part(part)}

    def foreign(self) -> list[str]:
        """Returns the sorted names that hfbatch did not write in the folder, except those that begin `_` or `.`."""
        names = list_names(self.fs, self.root).items()
        return sorted(name for name, folder in names if name[0] not in "_." and (folder or not is_part(name)))

    def remove(self, parts: Collection[str]) -> None:
        """Deletes parts, then their rejects. :raises OSError: if one cannot be deleted."""
        self._check()
        rejects = self.rejects()

        def remove_one(part: str) -> None:
            self._delete(part)
            if part in rejects:
                self._delete(rejects_of(part))

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(remove_one, parts))

    def rejects_without_part(self, parts: Collection[str]) -> list[str]:
        """Returns the sorted names of parts that have rejects but do not exist. :param parts: all parts."""
        return sorted(self.rejects().keys() - set(parts))

    def remove_rejects(self, parts: Collection[str]) -> None:
        """Deletes the rejects of parts. :raises OSError: when a file cannot be deleted."""
        self._check()
        for part in parts:
            self._delete(rejects_of(part))

    def clear(self) -> None:
        """Deletes hfbatch's files except locks; job.json last, so that an interrupted clear can be repeated."""
        self.clear_success()
        self.remove(self.list_parts())
        self.clean_temporary()
        clear_folder(self.fs, f"{self.root}/{INNER}")

    def read_job(self) -> dict[str, Any] | None:
        """Reads job.json; returns None if there is none. :raises SplitError: if it is not JSON."""
        return read_job(self.out)

    def holds_training(self) -> bool:
        """Returns whether job.json is that of a fine-tuning."""
        try:
            return is_training(self.read_job())
        except SplitError:
            return False

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Writes a file of the output atomically. :raises OSError: if it cannot be written."""
        write_file(self.fs, f"{self.root}/{name}", data, self._check)

    def write_errors(self, traces: Mapping[str, str], kinds: Collection[str]) -> None:
        """Writes the first traceback of each kind of failure to a file; deletes those of kinds that no longer occur.

        :param traces: tracebacks of this run, by kind.
        :param kinds: kinds of rejects in the whole output.
        :raises OSError: if a file cannot be written.
        """
        names = {kind: re.sub(r"\W+", "-", kind) + ".txt" for kind in {*traces, *kinds}}
        for kind, trace in traces.items():
            self.write(f"{ERRORS}/{names[kind]}", trace.encode("utf8", "replace"))
        for name in list_names(self.fs, f"{self.root}/{ERRORS}").keys() - set(names.values()):
            self._check()
            self._delete(f"{ERRORS}/{name}")

    def write_job(self, job: dict[str, Any]) -> None:
        """Writes job.json. :raises OSError: if it cannot be written."""
        self.write(JOB, json.dumps(job, indent=2).encode())

    def mark_success(self, summary: dict[str, Any], schema: pa.Schema) -> None:
        """Writes _SUCCESS, the last of all files: Parquet without rows, with the summary in its footer.

        :param schema: columns of the parts, since a reader that does not skip the file takes them from it.
        :raises OSError: if it cannot be written.
        """
        self.write(SUCCESS, part_table_bytes(empty_table(schema), {FOOTER_KEY: json.dumps(summary)}))

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
        for folder in (self.root, f"{self.root}/{INNER}", f"{self.root}/{REJECTS}", f"{self.root}/{ERRORS}"):
            for name in list_names(self.fs, folder):
                if is_temporary(name):
                    with suppress(FileNotFoundError):
                        os.unlink(f"{folder}/{name}")

    def check_writable(self) -> str | None:
        """Checks that the folder can be written; returns the fault or None. Leaves no files behind."""
        shown = redact(self.out)
        probe = f"{self.root}/{INNER}/.probe-{uuid.uuid4().hex}"
        made = absent_folders(f"{self.root}/{INNER}") if is_local(self.fs) else []
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

    def _named(self, names: Iterable[str]) -> dict[str, str]:
        """Returns the parts in a listing and their files."""
        found = {part_name(name): name for name in names if is_part(name)}
        self._stored = {part: name for part, name in found.items() if part != name}
        return found

    def _check(self) -> None:
        if self.claim is not None:
            self.claim.check()

    def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.fs.delete_file(f"{self.root}/{name}")


def clear_folder(fs: pafs.FileSystem, root: str) -> None:
    """Deletes the content of an inner folder except the lock; job.json last, since it identifies the owner."""
    for name, folder in sorted(list_names(fs, root).items(), key=lambda entry: entry[0] == "job.json"):
        with suppress(FileNotFoundError):
            if folder:
                fs.delete_dir(f"{root}/{name}")
            elif not lock_number(name):
                fs.delete_file(f"{root}/{name}")
    if kind_of(fs, root) == "folder" and not list_names(fs, root):
        fs.delete_dir(root)


def types_of(schema: pa.Schema) -> dict[str, str]:
    """Returns column names and types as text. Names of list items are ignored, since Parquet changes them."""
    return {field.name: str(field.type).replace("<item: ", "<element: ") for field in schema}

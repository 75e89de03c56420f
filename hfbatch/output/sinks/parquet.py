"""Parquet files as a sink: one part for each split, whose footer describes it. The folder itself is the record."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from hfbatch.data.filesystem import one_line, open_filesystem, redact
from hfbatch.data.formats.columns import conform
from hfbatch.data.splits import Split
from hfbatch.errors import SplitError
from hfbatch.output.jobfile import read_file
from hfbatch.output.layout import MANIFESTS, rejects_of
from hfbatch.output.ledger import Ledger
from hfbatch.output.manifest import Manifest
from hfbatch.output.sink import State
from hfbatch.output.sinks.footers import UNKNOWN, Footers, read_footer
from hfbatch.output.writer import FOOTER_KEY, part_table_bytes, write_file


class ParquetSink:
    """The parts of an output folder, as a `Sink`.

    :param ledger: the folder; its lock is checked before each change.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._read_before: Footers | None = None

    def state(self, splits: Sequence[Split]) -> State:
        """Compares splits with parts by name alone; no footer is read."""
        there = self.ledger.list_parts()
        done: list[Split] = []
        todo: list[Split] = []
        for split in splits:
            part = split.part
            (done if part in there else todo).append(split)
            there.discard(part)
        return State(done, todo, sorted(there))

    def discard(self, stale: Collection[str]) -> None:
        """Deletes parts, then their rejects. :raises OSError: if one cannot be deleted."""
        self.ledger.remove(stale)

    def clear(self) -> None:
        """Deletes all files of an earlier job. :raises OSError: if one cannot be deleted."""
        self.ledger.clear()
        self._read_before = None

    def finalise(self, done: Sequence[Split]) -> None:
        """Deletes the rejects of parts that were not committed. :raises OSError: if a file cannot be deleted."""
        self.ledger.remove_rejects(self.ledger.rejects_without_part([split.part for split in done]))

    def read_footer(self, part: str) -> dict[str, Any]:
        """Reads the footer of a part: split, manifest, fingerprint, model commit.

        :raises SplitError: if it cannot be read or was not written by hfbatch.
        """
        return read_footer(self.ledger.fs, self.ledger.path(part), part)[0]

    def manifests(self, parts: Iterable[str] | None = None) -> list[Manifest]:
        """Returns the manifest of each part, in order, from its footer; a footer that cannot be read gives its error.

        :param parts: default: all parts of one listing, sorted.
        """
        there = self.ledger.list_versions()
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
        there = self.ledger.list_versions()
        rejects = self.ledger.rejects()
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
        there, footers = self.ledger.list_versions(), self._footers()
        footers.of(there)
        footers.note(fresh)
        self.ledger.write(MANIFESTS, footers.dump(there))

    def _footers(self) -> Footers:
        if self._read_before is None:
            self._read_before = Footers(self.ledger.fs, self.ledger.path)
            data = read_file(self.ledger.fs, self.ledger.root, MANIFESTS)
            if data is not None:
                self._read_before.load(data)
        return self._read_before


@dataclass(frozen=True)
class StagedPart:
    """A part that is serialised and not yet in the folder."""

    part: str
    data: pa.Buffer


class PartWriter:
    """Writes parts to an output folder, as a `SinkWriter`.

    :param out: the output folder, a path or URL.
    :param schema: schema of every part.
    :param rejects_schema: schema of every rejects file, from `reject_schema`.
    :param stamp: plain values written to each footer: fingerprint, model commit.
    :param check: called right before each change; raises if this job no longer holds the output.
    """

    def __init__(
        self,
        out: str,
        schema: pa.Schema,
        rejects_schema: pa.Schema,
        stamp: Mapping[str, Any],
        check: Callable[[], None] | None = None,
    ) -> None:
        self.out, self.schema, self.rejects_schema, self.stamp = out, schema, rejects_schema, dict(stamp)
        self.check = check
        self.fs, self.root = open_filesystem(out)

    def stage(
        self, split: Split, table: pa.Table, rejects: pa.Table | None, manifest: Manifest
    ) -> StagedPart:
        """Writes the rejects, which count only with their part, and serialises the part.

        :raises LockLostError: if this job no longer holds the output.
        :raises SplitError: if rows are not conserved, columns are not the planned ones, or writing fails.
        """
        rejected = 0 if rejects is None else rejects.num_rows
        self._check(split, table, rejected, manifest)
        footer = {**self.stamp, "split": split.to_dict(), "manifest": vars(manifest)}
        name = rejects_of(split.part)
        if rejects is not None and rejected:
            self._write(name, part_table_bytes(conform(rejects, self.rejects_schema)))
        else:
            if self.check is not None:
                self.check()
            with self._named(name), suppress(FileNotFoundError):
                self.fs.delete_file(f"{self.root}/{name}")
        return StagedPart(split.part, part_table_bytes(table, {FOOTER_KEY: json.dumps(footer)}))

    def commit(self, staged: StagedPart) -> None:
        """Writes the part, which commits its rejects too.

        :raises LockLostError: if this job no longer holds the output.
        :raises SplitError: if writing fails.
        """
        self._write(staged.part, staged.data)

    def write(self, split: Split, table: pa.Table, rejects: pa.Table | None, manifest: Manifest) -> None:
        """Stages and commits a split."""
        self.commit(self.stage(split, table, rejects, manifest))

    def _write(self, name: str, data: pa.Buffer) -> None:
        with self._named(name):
            write_file(self.fs, f"{self.root}/{name}", data, self.check)

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Names the file that cannot be written."""
        try:
            yield
        except OSError as error:
            raise SplitError(
                f"{redact(self.out)}: {name} cannot be written: {one_line(error)}; free disk space or fix the permissions, then run "
                "again"
            ) from error

    def _check(self, split: Split, table: pa.Table, rejected: int, manifest: Manifest) -> None:
        counts = (split.rows, table.num_rows, rejected)
        stated = (manifest.rows_read, manifest.rows_out, manifest.rows_rejected)
        if counts != stated or manifest.rows_in != table.num_rows + rejected or manifest.rows_in > split.rows:
            raise SplitError(
                f"{split.part}: rows are not conserved: split {counts[0]}, output {counts[1]}, "
                f"rejects {counts[2]}; manifest: read {stated[0]}, in {manifest.rows_in}, out {stated[1]}, rejected {stated[2]}"
            )
        if not table.schema.equals(self.schema, check_metadata=False):
            raise SplitError(
                f"{split.part}: columns are {_columns(table.schema)}, planned were {_columns(self.schema)}"
            )


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{column.name}: {column.type}" for column in schema)

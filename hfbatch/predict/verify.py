"""Verifies a whole output against its input and its job.json. Changes nothing."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hfbatch.data.filesystem import is_url
from hfbatch.data.finite import non_finite
from hfbatch.data.source import Source, open_source
from hfbatch.data.splits import Piece, Split, where_of
from hfbatch.errors import SpecError, SplitError
from hfbatch.output.jobfile import is_training
from hfbatch.output.layout import JOB, rejects_of
from hfbatch.output.ledger import Ledger, types_of
from hfbatch.output.manifest import Manifest
from hfbatch.output.sinks.parquet import ParquetSink
from hfbatch.spec.job import JobSpec
from hfbatch.tasks import task_class

THREADS = 8


def verify_output(out: str, input_path: str | None = None) -> list[str]:
    """Returns every fault of an output, one sentence each; an empty list if there are none.

    Reads every part in full. Checks its rows against its footer and the input, its schema, its fingerprint, its
    rejects, and that computed values are finite. Finds missing parts, parts that belong to no split, and input rows
    that are in two parts.

    :param input_path: the present path of the input, if it has moved.
    """
    ledger = Ledger(out)
    job = ledger.read_job()
    if job is None:
        return [f"{ledger.out} is not an output of hfbatch: it has no {JOB}"]
    if is_training(job):
        return [
            f"{ledger.out} is the output of a training, not of a job; see `hfbatch status` and `hfbatch report`"
        ]
    try:
        source = _source(job, input_path)
        splits = source.cut(job["split_rows"], job["spec"]["input"]["limit"])
    except SpecError as error:
        return [f"the input cannot be compared: {fault}; use --input" for fault in error.faults]
    expected = {split.part: split for split in splits}
    parts = ledger.list_parts()
    faults = [
        f"{expected[part].fault or 'its part is missing'}: {describe(expected[part])}"
        for part in sorted(expected.keys() - parts)
    ]
    faults += _orphans(sorted(parts - expected.keys()), expected)
    present = sorted(expected.keys() & parts)
    computed, rejects = computed_columns(job), ledger.rejects()
    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(
            lambda part: _part_faults(ledger, part, expected[part], job, computed, rejects), present
        ):
            faults += found
        read = list(pool.map(lambda part: _pieces(ledger, part), sorted(parts)))
    faults += doubled(zip(sorted(parts), read, strict=True), source.root_url)
    faults += [
        f"the rejects {rejects_of(part)} belong to no part; delete them"
        for part in ledger.rejects_without_part(parts)
    ]
    if not faults and not ledger.has_success():
        faults.append("_SUCCESS is missing: the job has not finished, or had too many rejects")
    return faults


def describe(split: Split) -> str:
    """Describes the position of a split in the input."""
    first = split.pieces[0]
    more = f" and {len(split.pieces) - 1} more files" if len(split.pieces) > 1 else ""
    return f"{first.file} rows {first.start:,} to {first.stop:,}{more}"


def computed_columns(job: dict[str, Any]) -> list[str]:
    """Returns the computed output columns that have to be finite; none for a task whose results may be NaN.

    :param job: the content of job.json.
    """
    if not getattr(task_class(job["spec"]["task"]), "finite", True):
        return []
    output = job["identity"]["output"]
    return [name for name in job["schema"] if name not in (*output["keep"], output.get("truncated"))]


def doubled(parts: Iterable[tuple[str, Sequence[Piece]]], root: str) -> list[str]:
    """Returns faults of input rows that are in two parts, one sentence per file, also for a file with several names.

    :param parts: names of parts with the input pieces in their footers.
    :param root: folder or URL of the pieces' files.
    """
    places: defaultdict[str, list[tuple[int, int, str, str]]] = defaultdict(list)
    for part, pieces in parts:
        for piece in pieces:
            if piece.stop > piece.start:
                path = piece.file if is_url(root) else os.path.realpath(os.path.join(root, piece.file))
                places[path].append((piece.start, piece.stop, piece.file, part))
    faults = []
    for found in places.values():
        found.sort()
        for (_, stop, file, part), (start, end, other, second) in pairwise(found):
            if start < stop:
                as_well = "" if file == other else f", by its other name {other}"
                faults.append(
                    f"the input file {file} is read twice{as_well}: its rows {start:,} to {min(stop, end):,} are in {part} "
                    f"and in {second}"
                )
                break
    return faults


def _pieces(ledger: Ledger, part: str) -> Sequence[Piece]:
    """Returns the input pieces in a part's footer; none if it cannot be read, which is reported elsewhere."""
    try:
        return Split.from_dict(ParquetSink(ledger).read_footer(part)["split"]).pieces
    except SplitError:
        return ()


def _source(job: dict[str, Any], input_path: str | None) -> Source:
    spec = JobSpec.build(job["spec"])
    source = spec.input.model_copy(update={"path": input_path}) if input_path else spec.input
    return open_source(source, job.get("types"))


def _orphans(orphans: list[str], expected: dict[str, Split]) -> list[str]:
    """Returns faults of parts that belong to no split of the present input."""
    places: defaultdict[str, list[str]] = defaultdict(list)
    for part in expected:
        places[where_of(part)].append(part)
    return [
        f"{part} was made from another version of {describe(expected[places[where_of(part)][0]])}: the input has changed"
        if where_of(part) in places
        else f"{part} belongs to no split of the input"
        for part in orphans
    ]


def _part_faults(
    ledger: Ledger,
    part: str,
    split: Split,
    job: dict[str, Any],
    computed: Sequence[str],
    rejects: dict[str, str],
) -> list[str]:
    try:
        with ledger.fs.open_input_file(ledger.path(part)) as file:
            table = pq.read_table(file)
        footer = ParquetSink(ledger).read_footer(part)
    except (OSError, pa.ArrowInvalid, SplitError) as error:
        return [f"{part} cannot be read: {error}"]
    manifest = Manifest(**footer["manifest"])
    faults = []
    if footer["fingerprint"] != job["fingerprint"]:
        faults.append(
            f"{part} is of another job: its fingerprint is {footer['fingerprint']}, not {job['fingerprint']}"
        )
    if manifest.part != part:
        faults.append(f"{part} is a copy of {manifest.part}, which has other rows")
    if types_of(table.schema) != job["schema"]:
        faults.append(f"{part} has schema {types_of(table.schema)}, not {job['schema']}")
    if len(table) != manifest.rows_out:
        faults.append(f"{part} holds {len(table):,} rows, its footer says {manifest.rows_out:,}")
    if manifest.rows_in != manifest.rows_out + manifest.rows_rejected:
        faults.append(
            f"{part}: {manifest.rows_in:,} rows in, {manifest.rows_out:,} out, {manifest.rows_rejected:,} rejected"
        )
    if manifest.rows_read != split.rows:
        faults.append(f"{part} read {manifest.rows_read:,} rows, the input has {split.rows:,}")
    for name in set(computed) & set(table.column_names):
        rows = non_finite(table[name])
        if len(rows):
            faults.append(
                f"{part}: {name!r} is NaN or infinite in {len(rows):,} rows, first in row {rows[0]:,}"
            )
    return faults + _reject_faults(ledger, rejects.get(part), manifest)


def _reject_faults(ledger: Ledger, path: str | None, manifest: Manifest) -> list[str]:
    if not manifest.rows_rejected:
        return []
    part = manifest.part
    if path is None:
        return [f"the rejects of {part} are missing; run again"]
    try:
        with ledger.fs.open_input_file(path) as file:
            rows = pq.read_table(file).num_rows
    except (OSError, pa.ArrowInvalid) as error:
        return [f"the rejects of {part} cannot be read: {error}"]
    if rows != manifest.rows_rejected:
        return [f"the rejects of {part} hold {rows:,} rows, its footer says {manifest.rows_rejected:,}"]
    return []

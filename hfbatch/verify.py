"""Re-reads a whole output and compares it with the input and with what the job promised. Changes nothing."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hfbatch.data.ledger import Ledger, types_of
from hfbatch.data.manifest import Manifest
from hfbatch.data.source import open_source
from hfbatch.data.splits import Split, where_of
from hfbatch.errors import SpecError, SplitError
from hfbatch.spec import JobSpec

THREADS = 8


def verify_output(out: str, input_path: str | None = None) -> list[str]:
    """Every fault of an output, one sentence each; an empty list means that all is well.

    Reads every part in full: its rows against its footer and against the input, its schema, its fingerprint
    and its rejects; finds parts that are missing, that belong to no split, and splits with two parts.

    :param input_path: where the input is now, if it has moved.
    """
    ledger = Ledger(out)
    job = ledger.read_job()
    if job is None:
        return [f"{out} is no output of hfbatch: it has no _hfbatch/job.json"]
    if "train" in job["spec"]:
        return [f"{out} is a training, not the output of a job; see `hfbatch status` and `hfbatch report`"]
    try:
        splits = _splits(job, input_path)
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
    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(lambda part: _part_faults(ledger, part, expected[part], job), present):
            faults += found
    faults += [
        f"the rejects {name} belong to no part; delete them" for name in ledger.rejects_without_part(parts)
    ]
    if not faults and not ledger.has_success():
        faults.append("_SUCCESS is missing: the job has not finished, or had too many rejects")
    return faults


def describe(split: Split) -> str:
    """The place of a split in words."""
    first = split.pieces[0]
    more = f" and {len(split.pieces) - 1} more files" if len(split.pieces) > 1 else ""
    return f"{first.file} rows {first.start:,} to {first.stop:,}{more}"


def _splits(job: dict[str, Any], input_path: str | None) -> list[Split]:
    spec = JobSpec.build(job["spec"])
    source = spec.input.model_copy(update={"path": input_path}) if input_path else spec.input
    return open_source(source, job.get("types")).cut(job["split_rows"], spec.input.limit)


def _orphans(orphans: list[str], expected: dict[str, Split]) -> list[str]:
    """Parts that belong to no split of the input as it is now."""
    places: defaultdict[str, list[str]] = defaultdict(list)
    for part in expected:
        places[where_of(part)].append(part)
    return [
        f"{part} was made from another version of {describe(expected[places[where_of(part)][0]])}: the input has changed"
        if where_of(part) in places
        else f"{part} belongs to no split of the input"
        for part in orphans
    ]


def _part_faults(ledger: Ledger, part: str, split: Split, job: dict[str, Any]) -> list[str]:
    path = f"{ledger.root}/{part}"
    try:
        with ledger.fs.open_input_file(path) as file:
            table = pq.read_table(file)
        footer = ledger.read_footer(part)
    except (OSError, pa.ArrowInvalid, SplitError) as error:
        return [f"{part} cannot be read: {error}"]
    manifest = Manifest(**footer["manifest"])
    faults = []
    if footer["fingerprint"] != job["fingerprint"]:
        faults.append(
            f"{part} is of another job: its fingerprint is {footer['fingerprint']}, not {job['fingerprint']}"
        )
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
    return faults + _reject_faults(ledger, part, manifest)


def _reject_faults(ledger: Ledger, part: str, manifest: Manifest) -> list[str]:
    if not manifest.rows_rejected:
        return []
    path = f"{ledger.root}/_hfbatch/rejects/{part}"
    try:
        with ledger.fs.open_input_file(path) as file:
            rows = pq.read_table(file).num_rows
    except (OSError, pa.ArrowInvalid) as error:
        return [f"the rejects of {part} cannot be read: {error}"]
    if rows != manifest.rows_rejected:
        return [f"the rejects of {part} hold {rows:,} rows, its footer says {manifest.rows_rejected:,}"]
    return []

"""Small inputs for the tests of the data layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hfbatch.data.reader import ReadPlan, Rows, read_split
from hfbatch.data.source import Source, open_source
from hfbatch.data.splits import Split
from hfbatch.spec.job import InputSpec


def write_groups(path: Path, groups: list[list[int]]) -> None:
    """A Parquet file with one row group for each list of ids; `text` repeats the id."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for ids in groups:
            writer.write_table(pa.table({"id": ids, "text": [f"text {i}" for i in ids]}, schema))


def source_of(path: Path | str, **options: object) -> Source:
    return open_source(InputSpec.model_validate({"path": str(path), **options}))


def plan_of(source: Source, columns: tuple[str, ...] | None = None, condition: str | None = None) -> ReadPlan:
    names = columns or tuple(source.schema.names)
    schema = pa.schema([source.schema.field(name) for name in names])
    return ReadPlan(
        source.root_url, source.format, names, schema, source.hive, condition,
        given=source.given, whole=columns is None,
    )  # fmt: skip


def read_all(source: Source, splits: list[Split], condition: str | None = None) -> Rows:
    """All splits read one by one and put together."""
    plan = plan_of(source, condition=condition)
    rows = [read_split(split, plan) for split in splits]
    firsts = np.cumsum([0, *(len(r.table) for r in rows)]).tolist()
    bad = [
        replace(b, position=first + b.position) for first, r in zip(firsts, rows, strict=False) for b in r.bad
    ]
    unplanned: Counter[str] = sum((Counter(r.unplanned) for r in rows), Counter())
    return Rows(
        pa.concat_tables([r.table for r in rows]),
        pa.concat_tables([r.places for r in rows]),
        sum(r.read for r in rows),
        bad,
        dict(unplanned),
    )

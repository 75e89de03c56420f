"""Rows to features on the cluster: examined first, then written as Parquet that every training process opens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from hfbatch.data.filesystem import open_filesystem
from hfbatch.data.models import Model
from hfbatch.data.reader import ReadPlan, read_split
from hfbatch.data.splits import Split
from hfbatch.data.writer import part_table_bytes, write_file
from hfbatch.errors import SplitError
from hfbatch.finetune_spec import FinetuneSpec
from hfbatch.train.order import build_recipe
from hfbatch.train.recipes.base import Survey
from hfbatch.train.rows import LENGTH, ROW


@dataclass(frozen=True)
class Part:
    """One set of rows, `train` or `eval`, as every process can read it."""

    splits: Sequence[Split]
    read: ReadPlan
    columns: Mapping[str, str]
    """Column of the recipe to column of the rows."""
    share: tuple[float, int] | None = None
    """Share of the rows that are set aside, and the seed of the choice; None where they are all taken."""
    aside: bool = False
    """Take those that are set aside, in place of the others."""


@dataclass(frozen=True)
class Written:
    """What became of a split's rows."""

    rows: int
    features: int
    truncated: int
    tokens: int
    longest: int


def examine(spec: FinetuneSpec, model: Model, part: Part) -> Survey:
    """Looks at all rows. :raises SplitError: when some cannot be read."""

    def look(number: int, split: Split) -> dict[str, Any]:
        columns, places = _read(number, split, part)
        return vars(build_recipe(spec, model.fetch()).examine(columns, places))

    survey = Survey()
    for found in over_splits(part.splits, look):
        survey.add(Survey(**found))
    return survey


def write_features(
    spec: FinetuneSpec, model: Model, settled: dict[str, Any], part: Part, folder: str
) -> Written:
    """Writes the features of all rows, a file for each split, in order. :returns: sums over them."""
    firsts = np.cumsum([0, *(split.rows for split in part.splits)])

    def write(number: int, split: Split) -> dict[str, Any]:
        columns, places = _read(number, split, part)
        if not len(places):  # as the share of a split may be
            return asdict(Written(0, 0, 0, 0, 0))
        recipe = build_recipe(spec, model.fetch(), settled)
        made = recipe.features(columns, places)
        table, lengths = made.table, recipe.lengths(made.table)
        if ROW not in table.column_names:
            table = table.append_column(ROW, pa.array(np.arange(len(table))))
        rows = pa.array(table[ROW].to_numpy() + firsts[number])
        table = table.set_column(table.column_names.index(ROW), ROW, rows).append_column(
            LENGTH, pa.array(lengths)
        )
        fs, root = open_filesystem(folder)
        write_file(fs, f"{root}/part-{number:06d}.parquet", part_table_bytes(table))
        return asdict(
            Written(len(places), len(table), made.truncated, int(lengths.sum()), int(lengths.max(initial=0)))
        )

    found = [Written(**one) for one in over_splits(part.splits, write)]
    names = ("rows", "features", "truncated", "tokens")
    sums = {name: sum(getattr(one, name) for one in found) for name in names}
    return Written(**sums, longest=max((one.longest for one in found), default=0))


def _read(number: int, split: Split, part: Part) -> tuple[dict[str, pa.Array], pa.Table]:
    """The recipe's columns of a split, and where each row is from."""
    rows = read_split(split, part.read)
    table, places = rows.table, rows.places
    if part.share is not None:
        fraction, seed = part.share
        aside = np.random.default_rng([seed, number]).random(len(table)) < fraction
        kept = pa.array(aside if part.aside else ~aside)
        table, places = table.filter(kept), places.filter(kept)
    return {name: flatten(table[column]) for name, column in part.columns.items()}, places.combine_chunks()


def flatten(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array."""
    found = column.combine_chunks()
    return pa.concat_arrays(found.chunks) if isinstance(found, pa.ChunkedArray) else found


def over_splits(
    splits: Sequence[Split], work: Callable[[int, Split], dict[str, Any]]
) -> list[dict[str, Any]]:
    """What work makes of each split, in their order, on the cluster. :raises SplitError: if it fails on one."""

    def guarded(number: int) -> tuple[dict[str, Any], str]:
        try:
            return work(number, splits[number]), ""
        except Exception as error:  # noqa: BLE001 - told below with the file, in one sentence
            return {}, f"{splits[number].pieces[0].file}: {type(error).__name__}: {error}"

    task = ray.remote(num_cpus=1, max_retries=3)(guarded)
    found = ray.get([task.remote(number) for number in range(len(splits))])
    for _, fault in found:
        if fault:
            raise SplitError(fault)
    return [made for made, _ in found]

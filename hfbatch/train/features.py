"""Validates rows on the cluster, and converts them to features in Parquet, which every training process opens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayError

from hfbatch.data.filesystem import one_line, open_filesystem
from hfbatch.data.formats.columns import arrays_of
from hfbatch.data.media import NO_FILES
from hfbatch.data.media_files import RowFiles
from hfbatch.data.reader import ReadPlan, read_split
from hfbatch.data.splits import Split
from hfbatch.errors import SplitError, WorkerError
from hfbatch.hub.models import Model
from hfbatch.output.writer import part_table_bytes, write_file
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.data.held_out import compared, is_aside, row_hashes
from hfbatch.train.data.rows import LENGTH, ROW
from hfbatch.train.loop.worker_config import build_recipe
from hfbatch.train.recipes.base import MOST_FAULTS, DatasetStatistics, Recipe

POLL_S = 60
SILENCE_S = 4 * 3600
"""Timeout of waiting for the next split."""
MOST_LETTERS = 400
"""Maximum characters of a value in the report."""


@dataclass(frozen=True)
class Part:
    """The training or the evaluation set, as every process can read it."""

    splits: Sequence[Split]
    read: ReadPlan
    columns: Mapping[str, str]
    """Maps columns of the recipe to columns of the dataset."""
    share: tuple[float, int] | None = None
    """Share of the rows that is held out, and the seed of the choice; None if no rows are held out."""
    aside: bool = False
    """Whether this part is the held-out rows or the others."""
    files: RowFiles = NO_FILES
    """The files that the rows may name."""

    @property
    def rows(self) -> int:
        """Number of rows of the files, before filter and share."""
        return sum(split.rows for split in self.splits)


@dataclass(frozen=True)
class Written:
    """Statistics of the features of a split."""

    rows: int
    features: int
    truncated: int
    tokens: int
    longest: int


def validate_rows(spec: FinetuneSpec, model: Model, part: Part) -> DatasetStatistics:
    """Validates all rows on the cluster. :raises SplitError: if some cannot be read."""

    def validate(number: int, split: Split) -> dict[str, Any]:
        """Returns the statistics of a split."""
        return vars(validate_split(recipe_of(spec, model, part), split, part))

    statistics = DatasetStatistics()
    for found in over_splits(part.splits, validate):
        statistics.add(DatasetStatistics(**found))
    return statistics


def write_features(
    spec: FinetuneSpec, model: Model, fitted: Mapping[str, Any], part: Part, folder: str
) -> Written:
    """Writes the features of all rows on the cluster, one file per split, in order.

    :param fitted: what the recipe's `fit` returned.
    :returns: totals.
    """
    firsts = np.cumsum([0, *(split.rows for split in part.splits)])

    def write(number: int, split: Split) -> dict[str, Any]:
        """Writes the features of a split to its file; returns the fields of `Written`."""
        columns, places = read_rows(split, part)
        if not len(places):  # possible if rows are held out
            return asdict(Written(0, 0, 0, 0, 0))
        recipe = recipe_of(spec, model, part, fitted)
        table, truncated = make_features(recipe, columns, places, int(firsts[number]))
        lengths = table[LENGTH].to_numpy()
        fs, root = open_filesystem(folder)
        write_file(fs, f"{root}/part-{number:06d}.parquet", part_table_bytes(table))
        return asdict(
            Written(len(places), len(table), truncated, int(lengths.sum()), int(lengths.max(initial=0)))
        )

    found = [Written(**one) for one in over_splits(part.splits, write)]
    names = ("rows", "features", "truncated", "tokens")
    sums = {name: sum(getattr(one, name) for one in found) for name in names}
    return Written(**sums, longest=max((one.longest for one in found), default=0))


def recipe_of(
    spec: FinetuneSpec, model: Model, part: Part, fitted: Mapping[str, Any] | None = None
) -> Recipe:
    """Builds the recipe with access to the files that rows of the part may name."""
    return build_recipe(spec, model.fetch(), fitted, part.files)


def make_features(
    recipe: Recipe, columns: Mapping[str, pa.Array], places: pa.Table, first: int = 0
) -> tuple[pa.Table, int]:
    """Returns features with ROW and LENGTH, and the number of truncated rows. :param first: number of row 0."""
    made = recipe.features(columns, places)
    table, lengths = made.table, recipe.lengths(made.table)
    if ROW not in table.column_names:
        table = table.append_column(ROW, pa.array(np.arange(len(table))))
    rows = pa.array(table[ROW].to_numpy() + first)
    table = table.set_column(table.column_names.index(ROW), ROW, rows)
    return table.append_column(LENGTH, pa.array(lengths)), made.truncated


def validate_split(recipe: Recipe, split: Split, part: Part) -> DatasetStatistics:
    """Validates the rows of a split, with hashes to find duplicates; rows that cannot be read are faults."""
    columns, places, unreadable = _read(split, part)
    statistics = recipe.validate(columns, places)
    if part.share is not None:
        statistics.hashes = [compared(row_hashes(columns), part.rows)]
    statistics.faults = [*unreadable[:MOST_FAULTS], *statistics.faults]
    if len(unreadable) > MOST_FAULTS:
        statistics.faults.append(f"… and {len(unreadable) - MOST_FAULTS:,} more rows that cannot be read")
    return statistics


def read_rows(split: Split, part: Part) -> tuple[dict[str, pa.Array], pa.Table]:
    """Reads the recipe's columns of a split, and each row's file and number. :raises SplitError: if one is unreadable."""
    columns, places, unreadable = _read(split, part)
    if unreadable:
        raise SplitError(unreadable[0])
    return columns, places


def columns_of(table: pa.Table, part: Part) -> dict[str, pa.Array]:
    """Returns the recipe's columns of a table."""
    return arrays_of(table, part.columns)


def _read(split: Split, part: Part) -> tuple[dict[str, pa.Array], pa.Table, list[str]]:
    """Reads a split without the rows that cannot be read, for which it returns messages."""
    rows = read_split(split, part.read)
    kept = np.ones(len(rows.table), bool)
    if part.share is not None:
        aside = is_aside(row_hashes(columns_of(rows.table, part)), *part.share)
        kept = aside if part.aside else ~aside
    unreadable = []
    for bad in rows.bad:
        if kept[bad.position]:
            place = rows.places.slice(bad.position, 1).to_pylist()[0]
            unreadable.append(f"{place['file']} row {place['row']}: {bad.message}")
            kept[bad.position] = False
    table, places = rows.table, rows.places
    if not kept.all():
        table, places = table.filter(pa.array(kept)), places.filter(pa.array(kept))
    return columns_of(table, part), places.combine_chunks(), unreadable


def look_up(part: Part, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Reads rows by their numbers in `ROW`: `file`, `row` (its number there) and `values`, by column.

    Values are texts of at most MOST_LETTERS characters; columns that are not text, such as images, are left out.
    """
    firsts = np.cumsum([0, *(split.rows for split in part.splits)])
    owners = np.searchsorted(firsts, numbers, side="right") - 1
    read = {number: read_rows(part.splits[number], part) for number in sorted(set(owners.tolist()))}
    found = []
    for owner, number in zip(owners.tolist(), numbers, strict=True):
        columns, places = read[owner]
        at = number - int(firsts[owner])
        values = {
            part.columns[name]: as_text(column[at].as_py())
            for name, column in columns.items()
            if is_readable(column.type)
        }
        found.append({**places.slice(at, 1).to_pylist()[0], "values": values})
    return found


def is_readable(kind: pa.DataType) -> bool:
    """Returns whether the report shows columns of this Arrow type: texts, numbers, lists and structs of texts."""
    if pa.types.is_struct(kind):
        return all(is_readable(kind.field(at).type) for at in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = kind.value_type
        return is_readable(inner) and not (pa.types.is_integer(inner) or pa.types.is_floating(inner))
    return not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def as_text(value: Any) -> str:
    """Formats a value for the report, at most MOST_LETTERS characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…"


def _all_of(tasks: list[Any]) -> list[Any]:
    """Returns the results of tasks in their order. :raises WorkerError: if none of them ends within SILENCE_S."""
    waiting, latest = tasks, time.monotonic()
    while waiting:
        ended, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
        latest = time.monotonic() if ended else latest
        if time.monotonic() - latest > SILENCE_S:
            raise WorkerError(
                f"no split was read in {SILENCE_S // 3600} hours: other jobs may occupy the cluster (see `ray status`), or "
                "its rows are slow to read; lower train.split_rows"
            )
    return ray.get(tasks, timeout=SILENCE_S)


def over_splits(
    splits: Sequence[Split], work: Callable[[int, Split], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Runs a function on each split on the cluster; returns the results in order.

    :raises SplitError: if it fails for a split.
    :raises WorkerError: if its process dies repeatedly.
    """

    def guarded(number: int) -> tuple[dict[str, Any], str]:
        """Returns the result for a split, or the message of its failure: an exception here would end all tasks."""
        try:
            return work(number, splits[number]), ""
        except SplitError as error:
            return {}, str(error)
        except Exception as error:  # noqa: BLE001 - raised below with the file
            return {}, f"{splits[number].pieces[0].file}: {type(error).__name__}: {error}"

    task = ray.remote(num_cpus=1, max_retries=3)(guarded)
    try:
        found = _all_of([task.remote(number) for number in range(len(splits))])
    except RayError as error:
        raise WorkerError(
            f"a process died while it read rows: {one_line(error)}; if memory ran out, set train.split_rows to fewer than "
            f"{max(split.rows for split in splits):,}"
        ) from error
    for _, fault in found:
        if fault:
            raise SplitError(fault)
    return [made for made, _ in found]

"""Rows to features on the cluster: examined first, then written as Parquet that every training process opens."""

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
from hfbatch.data.models import Model
from hfbatch.data.reader import ReadPlan, read_split
from hfbatch.data.splits import Split
from hfbatch.data.writer import part_table_bytes, write_file
from hfbatch.errors import SplitError, WorkerError
from hfbatch.finetune_spec import FinetuneSpec
from hfbatch.tasks.parts.text import flatten
from hfbatch.train.order import build_recipe
from hfbatch.train.recipes.base import Recipe, Survey
from hfbatch.train.rows import LENGTH, ROW

POLL_S = 60
SILENCE_S = 4 * 3600
"""How long to wait for the next split that is read."""
MOST_LETTERS = 400
"""Letters of a value that are shown to people."""


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
        columns, places = read_rows(number, split, part)
        return vars(recipe_of(spec, model, part).examine(columns, places))

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
        columns, places = read_rows(number, split, part)
        if not len(places):  # as the share of a split may be
            return asdict(Written(0, 0, 0, 0, 0))
        recipe = recipe_of(spec, model, part, settled)
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


def recipe_of(spec: FinetuneSpec, model: Model, part: Part, settled: dict[str, Any] | None = None) -> Recipe:
    """The recipe, with paths in the rows relative to the folder that they are from."""
    recipe = build_recipe(spec, model.fetch(), settled)
    recipe.task.root = part.read.path
    return recipe


def make_features(
    recipe: Recipe, columns: Mapping[str, pa.Array], places: pa.Table, first: int = 0
) -> tuple[pa.Table, int]:
    """Features of some rows with ROW and LENGTH, and how many rows were truncated. :param first: number of row 0."""
    made = recipe.features(columns, places)
    table, lengths = made.table, recipe.lengths(made.table)
    if ROW not in table.column_names:
        table = table.append_column(ROW, pa.array(np.arange(len(table))))
    rows = pa.array(table[ROW].to_numpy() + first)
    table = table.set_column(table.column_names.index(ROW), ROW, rows)
    return table.append_column(LENGTH, pa.array(lengths)), made.truncated


def read_rows(number: int, split: Split, part: Part) -> tuple[dict[str, pa.Array], pa.Table]:
    """The recipe's columns of a split, and where each row is from."""
    rows = read_split(split, part.read)
    table, places = rows.table, rows.places
    if part.share is not None:
        fraction, seed = part.share
        aside = np.random.default_rng([seed, number]).random(len(table)) < fraction
        kept = pa.array(aside if part.aside else ~aside)
        table, places = table.filter(kept), places.filter(kept)
    return {name: flatten(table[column]) for name, column in part.columns.items()}, places.combine_chunks()


def look_up(part: Part, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Rows by the numbers that `ROW` gives them: `file`, `row` (its number there) and `values`, by column.

    Values are texts cut to MOST_LETTERS; columns that are no text, such as pictures, are left out.
    """
    firsts = np.cumsum([0, *(split.rows for split in part.splits)])
    owners = np.searchsorted(firsts, numbers, side="right") - 1
    read = {number: read_rows(number, part.splits[number], part) for number in sorted(set(owners.tolist()))}
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
    """Whether a column of this Arrow type is told to people: texts, numbers, and lists and structs of texts."""
    if pa.types.is_struct(kind):
        return all(is_readable(kind.field(at).type) for at in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = kind.value_type
        return is_readable(inner) and not (pa.types.is_integer(inner) or pa.types.is_floating(inner))
    return not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def as_text(value: Any) -> str:
    """A value for people, cut to MOST_LETTERS."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…"


def _all_of(tasks: list[Any]) -> list[Any]:
    """The results of tasks, in their order. :raises WorkerError: if for hours none of them comes to its end."""
    waiting, heard = tasks, time.monotonic()
    while waiting:
        ended, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
        heard = time.monotonic() if ended else heard
        if time.monotonic() - heard > SILENCE_S:
            raise WorkerError(
                f"no split was read in {SILENCE_S // 3600} hours: other jobs may hold the cluster (see `ray status`), or "
                "its rows are slow; lower train.split_rows"
            )
    return ray.get(tasks, timeout=SILENCE_S)


def over_splits(
    splits: Sequence[Split], work: Callable[[int, Split], dict[str, Any]]
) -> list[dict[str, Any]]:
    """What work makes of each split, in their order, on the cluster.

    :raises SplitError: if it fails on one.
    :raises WorkerError: if its process dies again and again.
    """

    def guarded(number: int) -> tuple[dict[str, Any], str]:
        try:
            return work(number, splits[number]), ""
        except SplitError as error:
            return {}, str(error)
        except Exception as error:  # noqa: BLE001 - told below with the file, in one sentence
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

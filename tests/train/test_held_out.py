"""Rows to measure with, set aside by what they hold: the same rows stay together, however the input is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfbatch.errors import SpecError
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.data.held_out import MOST_HASHES, compared, is_aside, repeat_notes, row_hashes
from hfbatch.train.estimate import describe_training
from hfbatch.train.features import Part, read_rows
from hfbatch.train.plan import FinetunePlan, make_finetune_plan
from tests.models.text import CORPUS, tiny_bert


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("model"))


def plan_of(model: str, folder: Path, split_rows: int | None = None, **options: Any) -> FinetunePlan:
    spec = {
        "task": "text-classification", "model": model, "output": str(folder / "out"),
        "train": {"path": str(folder / "rows"), "split_rows": split_rows},
        "evaluation": {"fraction": 0.3}, "batch": {"size": 8}, "workers": {"count": 1}, **options,
    }  # fmt: skip
    return make_finetune_plan(FinetuneSpec.build(spec))


def write(folder: Path, texts: Sequence[str], files: int = 1) -> None:
    """Rows with labels, each label that of its text, in a few files."""
    (folder / "rows").mkdir(exist_ok=True)
    labels = [str(CORPUS.index(text) % 2) for text in texts]
    for file, places in enumerate(np.array_split(np.arange(len(texts)), files)):
        table = pa.table({"text": texts, "label": labels, "id": range(len(texts))}).take(places)
        pq.write_table(table, folder / "rows" / f"{file}.parquet")


def texts_of(part: Part) -> list[str]:
    return [text for split in part.splits for text in read_rows(split, part)[0]["text"].to_pylist()]


def test_the_same_rows_are_never_on_both_sides(model: str, tmp_path: Path) -> None:
    """Whatever else is in the file: the column `id` is not learnt from. Each row is on one side, once."""
    texts = [text for text in CORPUS[:40] for _ in range(3)]
    write(tmp_path, texts, files=4)
    plan = plan_of(model, tmp_path)
    train, aside = texts_of(plan.train), texts_of(plan.eval)
    assert train
    assert aside
    assert not set(train) & set(aside)
    assert sorted(train + aside) == sorted(texts)


def test_the_choice_depends_on_neither_splits_nor_order(model: str, tmp_path: Path) -> None:
    chosen = []
    for number, (files, rows) in enumerate([(1, None), (3, None), (2, 7)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder, CORPUS[:60] if number else CORPUS[:60][::-1], files)
        chosen.append(set(texts_of(plan_of(model, folder, rows).eval)))
    assert chosen[0] == chosen[1] == chosen[2]
    assert texts_of(plan_of(model, tmp_path / "0", seed=1).eval) != texts_of(
        plan_of(model, tmp_path / "0").eval
    )


def test_how_many_rows_repeat_is_reported(model: str, tmp_path: Path) -> None:
    write(tmp_path, [*CORPUS[:40], *CORPUS[:3], CORPUS[0]])
    plan = plan_of(model, tmp_path)
    (note,) = [note for note in describe_training(plan)["notes"] if "duplicates" in note]
    assert note.startswith("4 rows are duplicates of another row")
    different = row_hashes({"text": pa.array(CORPUS[:40])})
    assert repeat_notes([different], 40) == []


def test_of_very_many_rows_a_part_is_compared_that_has_all_repeats() -> None:
    hashes = row_hashes({"text": pa.array([f"row {number % 5000}" for number in range(20_000)])})
    rows = 10 * MOST_HASHES
    kept = compared(hashes, rows)
    assert 0.07 < len(kept) / len(hashes) < 0.13
    (note,) = repeat_notes([kept[:500], kept[500:]], rows)
    about, number = note.split()[:2]
    assert about == "about"
    assert int(number.replace(",", "")) == pytest.approx(15_000, rel=0.15)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_the_share_is_that_of_the_different_rows(fraction: float, seed: int) -> None:
    hashes = row_hashes({"text": pa.array([f"row {number}" for number in range(20_000)])})
    assert is_aside(hashes, fraction, seed).mean() == pytest.approx(fraction, rel=0.25)


PNG = {"bytes": b"\x89PNG\xff\x00", "path": None}
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.string(), ["a", "b", "", None]),
        (pa.large_string(), ["1", "12", "é", None]),
        (pa.string_view(), ["a", "b", "a longer text than a view holds inside", None]),
        (pa.dictionary(pa.int32(), pa.string()), ["a", "b", None]),
        (pa.binary(), [b"\xff", b"\xff\x00", b"", None]),
        (pa.bool_(), [True, False, None]),
        (pa.int64(), [1, -1, 2**62, None]),
        (pa.float16(), [np.float16(1.5), np.float16(-2), None]),
        (pa.float64(), [1.5, 1.5000000000000002, None]),
        (pa.list_(pa.string()), [["a"], ["a", "b"], ["ab"], [], None, [None]]),
        (pa.list_(pa.int8()), [[1], [1, 2], [2, 1], [], None]),
        (pa.list_(pa.int64()), [[1], [1, None], [], None]),
        (pa.large_list(pa.float16()), [[np.float16(1)], [np.float16(1), np.float16(2)], []]),
        (pa.list_(pa.float32(), 2), [[1, 2], [2, 1]]),
        (pa.struct({"bytes": pa.binary(), "path": pa.string()}), [PNG, {**PNG, "path": "x"}, {**PNG, "bytes": b"x"}]),
        (pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})), [CHAT, CHAT[:1], CHAT[::-1], None]),
        (pa.null(), [None]),
    ],
    ids=str,
)  # fmt: skip
def test_rows_are_the_same_where_their_values_are(kind: pa.DataType, values: list[Any]) -> None:
    """For every type that training reads, in slices of larger arrays too."""
    array = pa.array([values[-1], *values, *values], kind)[1:]
    hashes = row_hashes({"a": array})
    assert hashes[: len(values)].tolist() == hashes[len(values) :].tolist()
    assert len(set(hashes.tolist())) == len(values)


def test_values_of_two_columns_are_not_mixed_up() -> None:
    hashes = row_hashes({"a": pa.array(["ab", "a", "", None]), "b": pa.array(["c", "bc", None, ""])})
    assert len(set(hashes.tolist())) == 4


def test_a_training_of_another_choice_is_not_continued(model: str, tmp_path: Path) -> None:
    """Its checkpoints have learnt from rows that are now measured with. One that is done stays done."""
    write(tmp_path, CORPUS[:40])
    plan = plan_of(model, tmp_path)
    older = {name: value for name, value in plan.identity.items() if name != "held_out"}
    assert older != plan.identity
    state = tmp_path / "out" / "__hfbatch" / "job.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps(replace(plan, identity=older).job()))
    with pytest.raises(
        SpecError, match=r"another training; it differs in held_out \(there: None, now: 'by what"
    ):
        plan_of(model, tmp_path)
    (tmp_path / "out" / "_SUCCESS").touch()
    assert plan_of(model, tmp_path).finished
    with pytest.raises(SpecError, match=r"differs in data .*seed"):
        plan_of(model, tmp_path, seed=7)

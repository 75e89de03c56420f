"""A row for which a model gives NaN or infinity is a reject, for every task, and no other row is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfbatch.data.finite import non_finite
from hfbatch.engines.base import EngineConfig
from hfbatch.engines.torch import TorchEngine
from hfbatch.runtime.predictor import Prediction, Predictor
from hfbatch.runtime.prepare import POSITION, postprocess, preprocess
from hfbatch.tasks import task_class
from hfbatch.tasks.base import Task
from tests.cases.every import CASES
from tests.models.text import CORPUS, tiny_bert, tiny_bert_for, tiny_llama, tiny_t5
from tests.tasks.drive import make

TEXTS = ["Zebra 77", *CORPUS[:3], "The Zebra reads.", *CORPUS[3:6]]
BAD = [0, 4]
GOOD = [k for k in range(len(TEXTS)) if k not in BAD]


def engine_of(task: Task) -> TorchEngine:
    return TorchEngine(EngineConfig(task.model.folder, task.auto_class, "float32", unused=task.unused))


def predict(task: Task, engine: TorchEngine, columns: dict[str, Any], size: int = 4) -> Prediction:
    arrays = {name: pa.array(values) for name, values in columns.items()}
    rows = len(next(iter(arrays.values())))
    places = pa.table({"file": ["rows.parquet"] * rows, "row": range(rows)})
    return Predictor(task, engine, size).predict(task.preprocess(arrays, places).table)


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_nan_gives_no_task_a_prediction(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    task = make(task_class(name), case.build(tmp_path), **case.params)
    columns = {
        column: pa.array(values[:2], case.types.get(column) or pa.array(values).type)
        for column, values in case.rows.items()
    }
    places = pa.table({"file": ["rows.parquet"] * 2, "row": range(2)})
    prepared = preprocess(task, columns, places)
    assert prepared.rejects == []
    engine = engine_of(task)
    with torch.no_grad():
        for weight in engine.model.parameters():
            weight.fill_(torch.nan)
    found = Predictor(task, engine, 2).predict(prepared.features.drop_columns([POSITION]))
    if len(found.kept):
        outputs = found.outputs.append_column(POSITION, pa.array(found.kept))
        kept, _, rejects = postprocess(task, task.output_fields(), outputs, columns)
        assert (len(kept), len(rejects)) == (0, len(found.kept)), "a row of NaN was taken for a prediction"
    assert len(found.failures) + len(found.kept) == 2


@pytest.mark.parametrize(
    ("name", "build", "params"),
    [
        ("text-classification", tiny_bert, {}),
        ("token-classification", lambda folder: tiny_bert_for(folder, "TokenClassification"), {}),
        ("text-generation", tiny_llama, {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}),
        ("text-generation", tiny_llama, {"max_new_tokens": 4, "do_sample": True, "temperature": 1.0}),
        ("text2text-generation", tiny_t5, {"max_new_tokens": 4, "num_beams": 2}),
        ("embedding", tiny_bert, {}),
    ],
)
def test_one_bad_embedding_rejects_the_rows_that_hold_it(
    tmp_path: Path, name: str, build: Any, params: dict[str, Any]
) -> None:
    """That of the first token of `Zebra`: no row with it has an answer, and the others have what they had."""
    task = make(task_class(name), build(tmp_path), **params)
    engine = engine_of(task)
    whole = predict(task, engine, {"text": TEXTS})
    assert whole.failures == []
    token = task.tokenizer("Zebra", add_special_tokens=False)["input_ids"][0]
    reader = engine.model.get_encoder() if name == "text2text-generation" else engine.model
    reader.set_input_embeddings(copy.deepcopy(reader.get_input_embeddings()))  # the decoder has them too
    with torch.no_grad():
        reader.get_input_embeddings().weight[token] = torch.nan
    found = predict(task, engine, {"text": TEXTS})
    assert sorted(row for row, _ in found.failures) == BAD
    assert {type(error).__name__ for _, error in found.failures} == {"NonFiniteOutput"}
    assert "NaN or infinite" in str(found.failures[0][1])
    assert found.kept.tolist() == GOOD
    assert found.outputs.to_pylist() == whole.outputs.take(pa.array(GOOD)).to_pylist()


def test_numbers_too_large_for_float16_are_reported_with_what_to_set(tmp_path: Path) -> None:
    task = make(task_class("embedding"), tiny_bert(tmp_path))
    engine = engine_of(task)
    engine.dtype = "float16"
    with torch.no_grad():
        engine.model.get_input_embeddings().weight.fill_(torch.inf)
    found = predict(task, engine, {"text": TEXTS})
    assert len(found.failures) == len(TEXTS)
    assert "set model.dtype to bfloat16 or float32" in str(found.failures[0][1])


def test_a_task_may_say_that_its_outputs_need_not_be_finite(tmp_path: Path) -> None:
    class Open(task_class("embedding")):  # type: ignore[misc]
        """Takes what comes."""

        finite = False

    task = make(Open, tiny_bert(tmp_path))
    engine = engine_of(task)
    with torch.no_grad():
        engine.model.get_input_embeddings().weight.fill_(torch.nan)
    found = predict(task, engine, {"text": TEXTS})
    assert (found.failures, len(found.kept)) == ([], len(TEXTS))


NUMBERS = st.none() | st.floats(width=32)
ROWS = st.lists(
    st.none() | st.fixed_dictionaries(
        {"a": st.none() | st.lists(NUMBERS, max_size=3), "b": st.lists(NUMBERS, min_size=2, max_size=2), "c": NUMBERS}
    ),
    max_size=6,
)  # fmt: skip
KIND = pa.struct([("a", pa.list_(pa.float32())), ("b", pa.list_(pa.float32(), 2)), ("c", pa.float32())])


@settings(max_examples=50, deadline=None)
@given(rows=ROWS, sliced=st.booleans())
def test_non_finite_numbers_are_found_at_any_depth(rows: list[Any], sliced: bool) -> None:
    column = (
        pa.array([{"a": [np.nan], "b": [1, 2], "c": 0}, *rows], KIND)[1:] if sliced else pa.array(rows, KIND)
    )

    def bad(value: Any) -> bool:
        if isinstance(value, dict):
            return any(map(bad, value.values()))
        if isinstance(value, list):
            return any(map(bad, value))
        return value is not None and not np.isfinite(value)

    assert non_finite(column).tolist() == [k for k, row in enumerate(rows) if bad(row)]
    lists = pa.array([[row] for row in rows], pa.list_(KIND))
    assert non_finite(pa.chunked_array([lists])).tolist() == [k for k, row in enumerate(rows) if bad(row)]

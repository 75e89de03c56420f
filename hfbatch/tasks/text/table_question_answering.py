"""Task table-question-answering: returns the cells of a table that answer a question."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.tasks.answer_agreement import Best
from hfbatch.tasks.base import Example, Histogram, InputColumn
from hfbatch.tasks.pipelines.pipeline import PipelineTask
from hfbatch.tasks.tokens import is_text, length_limit, list_lengths, text_column

PLACES = pa.list_(pa.struct([("row", pa.int32()), ("column", pa.int32())]))


def is_table(kind: pa.DataType) -> bool:
    """Whether a column of this Arrow type holds tables: JSON, a list per column, or a struct per row."""
    if pa.types.is_struct(kind):
        tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_null)
        return all(any(test(field.type) for test in tests) for field in kind)
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_text(kind) or (is_list and pa.types.is_struct(kind.value_type))


class TableQuestionAnswering(PipelineTask):
    """Returns the cells of each table that answer a question, and how to aggregate them, for example as a sum.

    Cells are read as text, null cells as empty. A struct has the same columns in every row of the dataset: columns
    that are null throughout a table are ignored. For tables that differ much, JSON is the better format.
    """

    name = "table-question-answering"
    summary = "The cells of a table that answer a question, by a TAPAS model"
    auto_class = "AutoModelForTableQuestionAnswering"
    pipeline = "hfbatch.tasks.pipelines.replacements.TablePipeline"
    inputs = (
        InputColumn(
            "table", is_table, "struct<column: list>, list<struct<column>>, or either as JSON in a string"
        ),
        text_column("question"),
    )
    outputs: ClassVar[Mapping[str, str]] = {
        "answer": "string, the cells joined, after the aggregator if there is one",
        "coordinates": "list<struct<row, column>>, from 0",
        "cells": "list<string>",
        "aggregator": "string, such as SUM; null for models that only select cells",
    }
    agreement = Best("answer")
    histogram = Histogram("cells", (0.0, *(float(2**k) for k in range(10))))
    EXAMPLE = Example(
        {
            "table": [{"city": ["Oslo", "Rome"], "people": ["717710", "2748109"]}],
            "question": ["Which city has more people?"],
        }
    )

    def check(self) -> list[str]:
        """Returns errors for a model other than TAPAS for question answering, and for a length beyond the model's."""
        from hfbatch.tasks.pipelines.replacements import architecture_faults

        instead = "a TAPAS for question answering; transformers 5 has no tokenizer for TAPEX"
        faults = architecture_faults(self, ("TapasForQuestionAnswering",), instead)
        limit = length_limit(self.tokenizer, self.config)
        if not faults and self.max_length and limit and self.max_length > limit:
            faults.append(f"batch.max_length {self.max_length} is more than the model's {limit} tokens")
        return faults or super().check()

    def output_fields(self) -> list[pa.Field]:
        """`answer`, `coordinates`, `cells` and `aggregator`."""
        kinds = (pa.string(), PLACES, pa.list_(pa.string()), pa.string())
        return [pa.field(name, kind) for name, kind in zip(self.outputs, kinds, strict=True)]

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Yields tables, each with a list of strings per column, and their questions."""
        for table, question in zip(columns["table"], columns["question"].to_pylist(), strict=True):
            yield {"table": columns_of(table.as_py()), "question": question}

    def is_cut(self, row: Any, steps: list[Any]) -> bool:
        """Whether rows or ends of cells were truncated."""
        from pandas import DataFrame

        table = DataFrame(row["table"])
        if len(table) >= self.tokenizer.max_row_id:
            return True
        whole = self.tokenizer(table, row["question"], truncation="do_not_truncate", verbose=False)
        return len(whole["input_ids"]) > steps[0]["input_ids"].shape[-1]

    def answer(self, result: Any) -> tuple[Any, ...]:
        """Returns the answer and its cells."""
        places = [{"row": int(row), "column": int(column)} for row, column in result["coordinates"]]
        return result["answer"], places, result["cells"], result.get("aggregator")

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the number of cells in each row's answer."""
        return list_lengths(columns[2])


def columns_of(table: Any) -> dict[str, list[str]]:
    """Converts a table to a list of strings per column.

    :param table: a dict of lists, a list of dicts, or either as JSON.
    :raises ValueError: for anything else, and for columns of different lengths.
    """
    if isinstance(table, str):
        table = json.loads(table)
    if isinstance(table, list) and all(isinstance(row, dict) for row in table):
        names = dict.fromkeys(name for row in table for name in row)
        table = {name: [row.get(name) for row in table] for name in names}
    if not isinstance(table, dict) or not all(isinstance(cells, list | None) for cells in table.values()):
        raise ValueError("the table is neither a list per column nor an object per row")
    known = {name: cells for name, cells in table.items() if any(cell is not None for cell in cells or [])}
    if len({len(cells) for cells in known.values()}) > 1:
        raise ValueError(f"the table's columns have {[len(cells) for cells in known.values()]} cells")
    return {name: ["" if cell is None else str(cell) for cell in cells] for name, cells in known.items()}

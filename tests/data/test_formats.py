"""A format of input files is one file and its name: nothing else in the package knows formats by name."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pytest

from hfbatch.data import listing
from hfbatch.data.formats import FORMATS, FormatKind
from hfbatch.errors import SpecError
from hfbatch.spec.job import InputSpec
from tests.data.inputs import read_all, source_of
from tests.layers import MODULES, ROOT, room_of


def comparisons(tree: ast.AST) -> list[str]:
    """Comparisons with the name of a format, also as one of several names, and cases of a `match`."""
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare | ast.MatchValue)]
    return [
        ast.unparse(node)
        for node in compared
        if any(isinstance(part, ast.Constant) and part.value in FORMATS for part in ast.walk(node))
    ]


def test_no_other_module_compares_the_name_of_a_format() -> None:
    found = {
        str(module): comparisons(ast.parse((ROOT / module).read_text(encoding="utf8")))
        for module in MODULES
        if room_of(module) != "data.formats"
    }
    assert {module: faults for module, faults in found.items() if faults} == {}


def test_the_comparisons_that_it_looks_for_are_found() -> None:
    source = """
if plan.format == "parquet" or spec.format in ("auto", "csv"):
    path = root + "parquet"
match name:
    case "jsonl" | "text":
        pass
"""
    assert comparisons(ast.parse(source)) == [
        "plan.format == 'parquet'",
        "spec.format in ('auto', 'csv')",
        "'jsonl'",
    ]


def test_the_spec_offers_every_format() -> None:
    assert get_args(InputSpec.model_fields["format"].annotation) == ("auto", *FORMATS)


def test_a_new_format_is_one_file_and_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = FormatKind("tests.data.arrowfiles:ArrowFormat", (".arrow",), (b"ARROW1",))
    monkeypatch.setitem(FORMATS, "arrow", kind)
    monkeypatch.setitem(listing.ENDINGS, ".arrow", "arrow")
    table = pa.table({"id": range(10), "text": [f"text {number}" for number in range(10)]})
    for name, rows in {"a.arrow": table[:7], "b": table[7:]}.items():
        with pa.OSFile(str(tmp_path / name), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(rows, max_chunksize=3)
    (tmp_path / "c.arrow").write_bytes(b"ARROW1 and no more")
    source = source_of(tmp_path)
    assert (source.format, source.schema.names, list(source.broken)) == ("arrow", ["id", "text"], ["c.arrow"])
    *splits, broken = source.cut(3)
    assert [split.rows for split in splits] == [3, 3, 1, 3]
    assert "c.arrow cannot be read" in str(broken.fault)
    assert read_all(source, splits).table.equals(table)
    with pytest.raises(
        SpecError, match=r"in the Arrow files; types can be given only for JSONL, CSV and key=value"
    ):
        source_of(tmp_path, types={"id": "string"})

"""Every task gives transformers' own answer for each row, as a job over Parquet, in batches and alone, on any engine.

The oracle runs each row alone: the pipeline where transformers has one, else the documented use of the class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image
from pydantic import TypeAdapter

import hfbatch
from hfbatch import JobSpec
from hfbatch.data.media_files import RowFiles
from hfbatch.engines import ENGINES
from hfbatch.predict.run import JobResult
from hfbatch.predict.verify import verify_output
from hfbatch.runtime.checks import engine_faults
from hfbatch.spec.engines import EngineSpec
from hfbatch.tasks import TASKS, task_class
from tests.cases.case import Case, near
from tests.cases.every import CASES, EXPORTABLE
from tests.jobs.here import job_here
from tests.jobs.tools import make_spec, read_output, read_rejects
from tests.models.video import moving, video_file
from tests.tasks.drive import make, run

NULL, UNREADABLE = 7, 9
EXPORTED = {"openvino", "onnx"}
"""Engines that run a graph of the model, which takes some ten seconds to export."""
COMPILED = {"name": "torch", "compile": True}
ALWAYS = {("token-classification", "openvino"), ("image-classification", "onnx")}
PAIRS = [
    pytest.param(name, engine, marks=() if (name, engine) in ALWAYS else pytest.mark.matrix)
    for engine in sorted(EXPORTED)
    for name in CASES
]


def test_every_task_has_a_case() -> None:
    assert set(CASES) == set(TASKS)


def write_rows(case: Case, folder: Path) -> list[dict[str, Any]]:
    """The case's rows as two shards, one of them null and one unreadable. :returns: the rows, by id."""
    rows = [dict(zip(case.rows, values, strict=True)) for values in zip(*case.rows.values(), strict=True)]
    assert len(rows) >= 20
    first = next(iter(case.rows))
    rows[NULL][first] = None
    if case.unreadable is not None:
        rows[UNREADABLE][first] = case.unreadable
    arrays = {name: pa.array([row[name] for row in rows], case.types.get(name)) for name in case.rows}
    table = pa.table({"id": range(len(rows)), **arrays})
    folder.mkdir()
    pq.write_table(table[:12], folder / "a.parquet")
    pq.write_table(table[12:], folder / "b.parquet")
    return rows


def set_up(name: str, folder: Path) -> tuple[str, list[int], dict[int, Any]]:
    """The case's model and rows. :returns: the model, ids of the bad rows, and the oracle's answers by id."""
    case = CASES[name]
    model, rows = case.build(folder / "model"), write_rows(case, folder / "in")
    bad = [NULL] if case.unreadable is None else [NULL, UNREADABLE]
    answer = case.oracle(model)
    expected = {k: answer(row) for k, row in enumerate(rows) if k not in bad}
    assert len({repr(one) for one in expected.values()}) > 5, "the oracle says the same of most rows"
    return model, bad, expected


def check_job(
    name: str,
    folder: Path,
    model: str,
    bad: list[int],
    expected: Mapping[int, Any],
    run_job: Callable[[JobSpec], JobResult],
    workers: int,
    size: int,
    engine: str = "torch",
    section: Any = None,
) -> None:
    """Runs the case as a job and compares its rows with the oracle's."""
    out = folder / f"out-{engine}-{size}-{workers}"
    spec = make_spec(
        name, model, folder / "in", out, engine=section or engine, params=dict(CASES[name].params), batch={"size": size},
        workers={"count": workers}, input={"split_rows": 8}, output={"keep": ["id"]}, rejects={"max_fraction": 0.2},
    )  # fmt: skip
    result = run_job(spec)
    assert result.exit_code == 0, result.message
    assert verify_output(str(out)) == []
    assert [reject["id"] for reject in read_rejects(out)] == bad
    compare({row.pop("id"): row for row in read_output(out).to_pylist()}, expected)


def engine_spec(name: str) -> EngineSpec:
    return TypeAdapter(EngineSpec).validate_python(name)


def compare(found: Mapping[int, Any], expected: Mapping[int, Any]) -> None:
    assert list(found) == list(expected)
    for k, want in expected.items():
        assert near(found[k], want), (k, found[k], want)


@pytest.mark.parametrize("name", CASES)
def test_a_job_gives_the_answers_of_transformers(tmp_path: Path, name: str) -> None:
    """In whole batches, with every engine that runs the model itself and can run the task, and row by row; without Ray,
    which carries the splits of all tasks in the same way."""
    model, bad, expected = set_up(name, tmp_path)
    case, good = CASES[name], list(expected)
    task = make(task_class(name), model, **case.params)
    for engine in {name for name, kind in ENGINES.items() if not kind.apart} - EXPORTED:
        if not engine_faults(engine_spec(engine), "float32", task):
            check_job(name, tmp_path, model, bad, expected, job_here, workers=1, size=8, engine=engine)
    columns = {
        column: pa.array([values[k] for k in good], case.types.get(column))
        for column, values in case.rows.items()
    }
    alone = run(task, columns, size=1).to_pylist()
    compare(dict(zip(good, alone, strict=True)), expected)


@pytest.mark.parametrize(("name", "engine"), PAIRS)
def test_an_exported_model_gives_the_answers_of_transformers(tmp_path: Path, name: str, engine: str) -> None:
    model, bad, expected = set_up(name, tmp_path)
    faults = engine_faults(
        engine_spec(engine), "float32", make(task_class(name), model, **CASES[name].params)
    )
    assert bool(faults) == (name not in EXPORTABLE), faults
    if not faults:
        check_job(name, tmp_path, model, bad, expected, job_here, workers=1, size=8, engine=engine)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "name", sorted(EXPORTABLE - {"image-feature-extraction"})
)  # its images have several sizes
def test_a_compiled_model_gives_the_answers_of_transformers(tmp_path: Path, name: str) -> None:
    check_job(name, tmp_path, *set_up(name, tmp_path), job_here, 1, 8, "compiled", COMPILED)


@pytest.mark.usefixtures("ray_cluster")
def test_a_job_on_a_cluster_gives_the_answers_of_transformers(tmp_path: Path) -> None:
    """The steps of a pipeline, which travel as bytes. Token lists do in test_resume.py, generated text in test_job.py."""
    name = "object-detection"
    check_job(name, tmp_path, *set_up(name, tmp_path), partial(hfbatch.run, quiet=True), workers=1, size=1)


def make_file(path: Path) -> None:
    """A picture, sound or video, by the ending of its name."""
    random = np.random.default_rng(len(path.name))
    if path.suffix in (".jpg", ".png"):
        Image.fromarray(random.integers(0, 255, (40, 50, 3), np.uint8)).save(path)
    elif path.suffix in (".wav", ".flac"):
        soundfile.write(path, random.normal(0, 0.1, 16_000), 16_000)
    elif path.suffix == ".mp4":
        path.write_bytes(video_file(moving(12, 0)))


@pytest.mark.parametrize("name", CASES)
def test_the_example_of_a_task_runs(tmp_path: Path, name: str) -> None:
    kind = task_class(name)
    task = make(
        kind, CASES[name].build(tmp_path / "model"), files=RowFiles(str(tmp_path)), **kind.EXAMPLE.params
    )
    for values in kind.EXAMPLE.rows.values():
        for value in values:
            if isinstance(value, str) and value.split(".")[-1].isalnum():
                make_file(tmp_path / value)
    assert task.check() == []
    table = run(task, kind.EXAMPLE.rows)
    assert len(table) == len(next(iter(kind.EXAMPLE.rows.values())))
    assert table.schema.names == [name for name in kind.outputs if name in table.schema.names]

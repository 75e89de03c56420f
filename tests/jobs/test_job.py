"""A job from a Parquet folder to a Parquet folder: same answers as transformers, every row exactly once."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings
from transformers import pipeline

import hfbatch
from hfbatch import JobResult, JobSpec
from hfbatch.output.layout import REJECTS
from hfbatch.predict.verify import verify_output
from tests.jobs.here import job_here
from tests.jobs.tools import (
    make_spec,
    part_stamps,
    read_output,
    read_rejects,
    sentences,
    write_shards,
)
from tests.models.text import CHAT_TEMPLATE, tiny_llama

cluster = pytest.mark.usefixtures("ray_cluster")


def vectors(table: pa.Table) -> np.ndarray:
    return table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)


@cluster
def test_embeddings_equal_sentence_transformers(tmp_path: Path, minilm: str) -> None:
    texts: list[str | None] = [*sentences(30, most=6), "", "word " * 400]
    texts[7] = None
    write_shards(tmp_path / "in", texts)
    spec = make_spec("embedding", minilm, tmp_path / "in", tmp_path / "out", rejects={"max_fraction": 0.1})

    result = job_here(spec)

    assert result.exit_code == 0
    out = read_output(tmp_path / "out")
    assert out["id"].to_pylist() == [k for k in range(32) if k != 7]
    assert out.schema.field("embedding").type == pa.list_(pa.float32(), 384)
    expected = SentenceTransformer(minilm, device="cpu").encode([text for text in texts if text is not None])
    cosine = (vectors(out) * expected).sum(1)
    assert cosine.min() > 0.9999
    (reject,) = read_rejects(tmp_path / "out")
    assert (reject["id"], reject["hfbatch_error"], reject["hfbatch_row"]) == (7, "NullInput", 7)
    rows = result.report["rows"]
    assert (rows["in"], rows["out"], rows["rejected"], rows["truncated"]) == (32, 31, 1, 1)
    assert verify_output(str(tmp_path / "out")) == []
    counts = [ray.data.read_parquet(str(tmp_path / "out" / folder)).count() for folder in ("", REJECTS)]
    assert counts == [31, 1]  # tests/jobs/test_layout.py has the other readers


def test_classification_equals_the_pipeline(tmp_path: Path, classifier: str) -> None:
    texts = sentences(40, most=4)
    write_shards(tmp_path / "in", texts)
    spec = make_spec(
        "sentiment-analysis",
        classifier,
        tmp_path / "in",
        tmp_path / "out",
        params={"top_k": 2},
        output={"keep": ["id"]},
    )

    assert job_here(spec).exit_code == 0

    out = read_output(tmp_path / "out")
    assert out.column_names == ["id", "label", "score"]
    oracle = pipeline("text-classification", classifier, device="cpu", top_k=2)
    for row, text in zip(out.to_pylist(), texts, strict=True):
        (expected,) = oracle(text, truncation=True)
        assert row["label"] == [best["label"] for best in expected]
        assert row["score"] == pytest.approx([best["score"] for best in expected], abs=1e-5)


def test_generation_equals_the_pipeline_for_prompts_and_chats(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", chat_template=CHAT_TEMPLATE)
    texts = [text[:60] for text in sentences(12, most=1)]
    write_shards(tmp_path / "in", texts)
    chats = [[{"role": "user", "content": text[:30]}] for text in texts]
    (tmp_path / "chats").mkdir()
    pq.write_table(pa.table({"id": range(12), "messages": chats}), tmp_path / "chats" / "a.parquet")
    params = {"max_new_tokens": 8, "do_sample": False}
    oracle = pipeline("text-generation", model, device="cpu")

    for source, inputs in (("in", texts), ("chats", chats)):
        out = tmp_path / f"out-{source}"
        assert (
            job_here(make_spec("text-generation", model, tmp_path / source, out, params=params)).exit_code
            == 0
        )
        found = read_output(out)["generated_text"].to_pylist()
        assert found == [oracle(one, **params)[0]["generated_text"] for one in inputs]


@pytest.mark.timeout(300)
@cluster
def test_sampling_does_not_depend_on_processes_or_batches(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    write_shards(tmp_path / "in", [text[:40] for text in sentences(16, most=1)])
    params = {"max_new_tokens": 6, "do_sample": True, "temperature": 1.5}

    def texts(run: Callable[[JobSpec], JobResult], size: int, seed: int) -> list[str]:
        out = tmp_path / f"out-{size}-{seed}"
        spec = make_spec(
            "text-generation", model, tmp_path / "in", out,
            params=params, batch={"size": size}, workers={"count": 2}, seed=seed, input={"split_rows": 4},
        )  # fmt: skip
        assert run(spec).exit_code == 0
        return read_output(out)["generated_text"].to_pylist()

    found = texts(job_here, 1, 0)
    assert texts(partial(hfbatch.run, quiet=True), 8, 0) == found
    assert texts(job_here, 1, 1) != found


def test_batch_size_changes_rounding_alone(tmp_path: Path, minilm: str) -> None:
    write_shards(tmp_path / "in", sentences(40, most=6), shards=1)
    found = []
    for size in (1, 32):
        out = tmp_path / f"out-{size}"
        spec = make_spec("embedding", minilm, tmp_path / "in", out, batch={"size": size})
        assert job_here(spec).exit_code == 0
        found.append(vectors(read_output(out)))
    assert np.abs(found[0] - found[1]).max() < 1e-5


@pytest.mark.timeout(300)
@cluster
def test_a_rerun_does_nothing_and_a_new_file_is_all_that_is_added(tmp_path: Path, encoder: str) -> None:
    write_shards(tmp_path / "in", sentences(30))
    options = {"batch": {"size": "auto"}, "params": {"precision": "uint8"}}
    spec = make_spec("embedding", encoder, tmp_path / "in", tmp_path / "out", **options)
    assert hfbatch.run(spec, quiet=True).exit_code == 0
    stamps = part_stamps(tmp_path / "out")
    job = json.loads((tmp_path / "out/__hfbatch/job.json").read_text())
    assert job["settled"]["batch_size"] in (16, 32, 64, 128)

    again = hfbatch.run(spec, quiet=True)
    assert again.exit_code == 0
    assert part_stamps(tmp_path / "out") == stamps

    write_shards(tmp_path / "in", sentences(10, seed=1), shards=1, first_id=2**20)
    more = hfbatch.run(spec, quiet=True)
    assert more.exit_code == 0
    assert more.report["rows"]["out"] == 40
    assert len(read_output(tmp_path / "out")) == 40
    assert verify_output(str(tmp_path / "out")) == []
    assert json.loads((tmp_path / "out/__hfbatch/job.json").read_text())["settled"] == job["settled"]
    # All parts, of several processes and of both runs, are stored in the ranges that the first worker took.
    exact = make_spec("embedding", encoder, tmp_path / "in", tmp_path / "exact", output={"keep": ["id"]})
    assert job_here(exact).exit_code == 0
    ranges = np.array(job["settled"]["fitted"]["ranges"])
    expected = quantize_embeddings(vectors(read_output(tmp_path / "exact")), "uint8", ranges)
    got = vectors(read_output(tmp_path / "out"))
    assert np.abs(got.astype(int) - expected).max() <= 1  # another batch size rounds differently
    assert (got != expected).mean() < 0.01


def test_a_changed_file_replaces_its_part_alone(tmp_path: Path, encoder: str) -> None:
    write_shards(tmp_path / "in", sentences(3000, most=1), shards=2)
    spec = make_spec("embedding", encoder, tmp_path / "in", tmp_path / "out", batch={"size": 64})
    assert job_here(spec).exit_code == 0
    before = part_stamps(tmp_path / "out")
    assert len(before) == 2
    changed = tmp_path / "in/shard-00000-001.parquet"
    pq.write_table(pq.read_table(changed).slice(0, 1400), changed)

    assert job_here(spec).exit_code == 0

    after = part_stamps(tmp_path / "out")
    assert len(after) == 2
    assert len(set(after.items()) & set(before.items())) == 1
    assert len(read_output(tmp_path / "out")) == 2900


def test_filter_limit_prefix_and_keep(tmp_path: Path, encoder: str) -> None:
    write_shards(tmp_path / "in", sentences(30))
    spec = make_spec(
        "embedding", encoder, tmp_path / "in", tmp_path / "out",
        input={"filter": "id % 2 = 0", "limit": 25}, output={"keep": ["id"], "prefix": "bert_"},
    )  # fmt: skip
    result = job_here(spec)
    assert result.exit_code == 0
    out = read_output(tmp_path / "out")
    assert out.column_names == ["id", "bert_embedding"]
    assert out["id"].to_pylist() == list(range(0, 25, 2))
    assert result.report["rows"]["filtered"] == 12
    assert verify_output(str(tmp_path / "out")) == []


def test_hive_folders_jsonl_and_csv_are_inputs_too(tmp_path: Path, encoder: str) -> None:
    texts = sentences(12, most=2)
    write_shards(tmp_path / "hive/lang=en", texts[:6], shards=1)
    write_shards(tmp_path / "hive/lang=de", texts[6:], shards=1, first_id=6)
    rows = [{"id": k, "text": text} for k, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.csv").write_text(  # with times in seconds, which Parquet does not have
        "id,at,text\n"
        + "".join(f'{k},2024-01-02 10:00:0{k % 10},"{text}\nend"\n' for k, text in enumerate(texts))
    )
    for name in ("hive", "rows.jsonl", "rows.csv"):
        out = tmp_path / f"out-{name}"
        result = job_here(make_spec("embedding", encoder, tmp_path / name, out))
        assert result.exit_code == 0, result.message
        found = read_output(out)
        assert found["id"].to_pylist() == list(range(12))
        if name == "hive":
            assert found["lang"].to_pylist() == ["en"] * 6 + ["de"] * 6
        assert verify_output(str(out)) == []

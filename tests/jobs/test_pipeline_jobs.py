"""Tasks that go through their pipeline run as any job does: every row once, whatever the batches and workers."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

import hfbatch
from hfbatch.verify import verify_output
from tests.jobs.tools import make_spec, read_output, read_rejects, sentences, write_shards
from tests.models.text import tiny_bert_for, tiny_t5
from tests.models.vision import tiny_vision

pytestmark = pytest.mark.usefixtures("ray_cluster")
TAGS = {0: "O", 1: "B-PER", 2: "I-PER"}


def run(tmp_path: Path, task: str, model: str, size: int, workers: int, **params: Any) -> pa.Table:
    """The output of a job over the folder `in`, whose row 7 is null."""
    out = tmp_path / f"out-{size}-{workers}"
    spec = make_spec(
        task, model, tmp_path / "in", out, params=params, batch={"size": size}, workers={"count": workers},
        input={"split_rows": 8}, output={"keep": ["id"]}, rejects={"max_fraction": 0.2},
    )  # fmt: skip
    result = hfbatch.run(spec, quiet=True)
    assert result.exit_code == 0, result.message
    assert verify_output(str(out)) == []
    return read_output(out)


@pytest.mark.parametrize(("size", "workers"), [(1, 1), (8, 2)])
def test_entities_of_texts(tmp_path: Path, size: int, workers: int) -> None:
    model = tiny_bert_for(tmp_path / "model", "TokenClassification", id2label=TAGS)
    texts: list[str | None] = [*sentences(22, most=2), ""]
    texts[7] = None
    write_shards(tmp_path / "in", texts)

    found = run(tmp_path, "ner", model, size, workers, aggregation_strategy="simple")

    oracle = pipeline("token-classification", model, device="cpu", aggregation_strategy="simple")
    expected = [oracle(text) for text in texts if text is not None]
    assert found["id"].to_pylist() == [k for k in range(23) if k != 7]
    for got, want in zip(found["entities"].to_pylist(), expected, strict=True):
        assert [{**one, "score": 0} for one in got] == [{**one, "score": 0} for one in want]
        assert np.allclose([one["score"] for one in got], [one["score"] for one in want], atol=1e-4)


@pytest.mark.parametrize(("size", "workers"), [(1, 1), (8, 2)])
def test_labels_of_pictures_beside_the_shards(tmp_path: Path, size: int, workers: int) -> None:
    model = tiny_vision(tmp_path / "model", "ViTForImageClassification", id2label=TAGS)
    random = np.random.default_rng(1)
    pictures = [Image.fromarray(random.integers(0, 255, (20 + k, 30, 3), np.uint8)) for k in range(22)]
    (tmp_path / "in" / "_pictures").mkdir(parents=True)
    paths: list[str | None] = []
    for k, picture in enumerate(pictures):
        paths.append(f"_pictures/{k}.png")
        picture.save(tmp_path / "in" / "_pictures" / f"{k}.png")
    paths[7] = None
    (tmp_path / "in" / "_pictures" / "9.png").write_bytes(b"this is no picture")
    pq.write_table(pa.table({"id": range(22), "image": paths}), tmp_path / "in" / "a.parquet")

    found = run(tmp_path, "image-classification", model, size, workers, top_k=1)

    oracle = pipeline("image-classification", model, device="cpu", top_k=1)
    for row in found.to_pylist():
        picture = BytesIO((tmp_path / "in" / "_pictures" / f"{row['id']}.png").read_bytes())
        (want,) = oracle(Image.open(picture))
        assert row["label"] == [want["label"]]
        assert row["score"] == pytest.approx([want["score"]], abs=1e-4)
    rejects = read_rejects(tmp_path / f"out-{size}-{workers}")
    assert [(one["id"], one["hfbatch_error"]) for one in rejects] == [(7, "NullInput"), (9, "ValueError")]
    assert len(found) == 20


def test_summaries_of_texts(tmp_path: Path) -> None:
    model = tiny_t5(tmp_path / "model")
    texts: list[str | None] = [*sentences(20, most=2)]
    write_shards(tmp_path / "in", [*texts[:7], None, *texts[7:]])

    found = run(tmp_path, "summarization", model, 8, 2, max_new_tokens=8, num_beams=2)

    tokenizer = AutoTokenizer.from_pretrained(model)
    t5 = AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    expected = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False, truncation=True)
        best = t5.generate(**ids, max_new_tokens=8, num_beams=2, do_sample=False)
        expected.append(tokenizer.decode(best[0], skip_special_tokens=True))
    assert found["summary_text"].to_pylist() == expected

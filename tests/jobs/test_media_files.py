"""Pictures as files beside the shards: a job finds them by paths relative to its input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import pipeline

import hfbatch
from tests.cases.case import columns_of, near
from tests.jobs.tools import make_spec, read_output, read_rejects
from tests.models.vision import tiny_vision

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_paths_are_relative_to_the_input(tmp_path: Path) -> None:
    model = tiny_vision(tmp_path / "model", "ViTForImageClassification", id2label={0: "cat", 1: "dog"})
    folder = tmp_path / "in" / "_pictures"
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    for k in range(12):
        Image.fromarray(random.integers(0, 255, (20 + k, 30, 3), np.uint8)).save(folder / f"{k}.png")
    (folder / "9.png").write_bytes(b"this is no picture")
    paths: list[str | None] = [f"_pictures/{k}.png" for k in range(12)]
    paths[7], paths[8] = None, "_pictures/missing.png"
    pq.write_table(pa.table({"id": range(12), "image": paths}), tmp_path / "in" / "a.parquet")
    spec = make_spec(
        "image-classification", model, tmp_path / "in", tmp_path / "out", rejects={"max_fraction": 0.3}
    )

    assert hfbatch.run(spec, quiet=True).exit_code == 0

    oracle = pipeline("image-classification", model, device="cpu")
    found = read_output(tmp_path / "out").to_pylist()
    assert [row["id"] for row in found] == [0, 1, 2, 3, 4, 5, 6, 10, 11]
    for row in found:
        answer = columns_of(oracle(str(folder / f"{row['id']}.png")))
        assert near({name: row[name] for name in answer}, answer)
    rejects = [(one["id"], one["hfbatch_error"]) for one in read_rejects(tmp_path / "out")]
    assert rejects == [(7, "NullInput"), (8, "FileNotFoundError"), (9, "ValueError")]

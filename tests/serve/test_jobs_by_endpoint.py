"""A job on engine http, answered by an endpoint of hfbatch, equals the job that runs the same model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hfbatch.predict.plan import make_plan
from hfbatch.runtime.runner import Runner
from tests.jobs.tools import make_spec, write_shards
from tests.serve.conftest import Served
from tests.serve.test_app import of_job

TEXTS = ["a cat", "two dogs on a mat", "the end of the very long story about a cat and two dogs"]


def by_endpoint(
    served: Served, name: str, task: str, folder: Path, column: str, rows: list[Any], **params: Any
) -> dict[str, list[Any]]:
    """The columns that a job gives for the rows, and no rejects."""
    engine = {"name": "http", "url": served.url}
    spec = make_spec(
        task, name, write_shards(folder / "in", TEXTS), folder / "out",
        model={"dtype": "auto"}, engine=engine, params=params,
    )  # fmt: skip
    done = Runner(make_plan(spec).runner).run({column: pa.array(rows)})
    assert not done.rejects
    return {name: array.to_pylist() for name, array in done.columns.items()}


def test_vectors_are_those_of_the_model(embedder: Served, tmp_path: Path) -> None:
    found = by_endpoint(embedder, "my-embedder", "embedding", tmp_path, "text", TEXTS)
    np.testing.assert_allclose(found["embedding"], of_job(embedder, text=TEXTS)["embedding"], atol=1e-5)


def test_greedy_texts_and_counts_are_those_of_the_model(chat: Served, tmp_path: Path) -> None:
    options = {"max_new_tokens": 12, "do_sample": False, "details": True}
    found = by_endpoint(chat, "chat", "text-generation", tmp_path, "text", TEXTS, **options)
    assert found == of_job(chat, {"details": True}, text=TEXTS)
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    found = by_endpoint(chat, "chat", "text-generation", tmp_path, "messages", chats, **options)
    assert found == of_job(chat, {"details": True}, messages=chats)

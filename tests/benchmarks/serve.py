"""Serving: an endpoint of hfbatch and the plain pipeline behind FastAPI, under the same load, in turn.

Both answer one text in each request with the embedding of all-MiniLM-L6-v2, or with the label of a classifier, in float32 on
all cores (`taskset -c 0,1` for two). The peer is what a user writes first: a FastAPI route that calls the pipeline of
transformers, under uvicorn. The load is that of `hfbatch serve --check`: each concurrent client sends its next request when
it has the answer to the last.

    taskset -c 0,1 python -m tests.benchmarks.serve --source ag_news.parquet --clients 200
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow.parquet as pq
import requests

from hfbatch.serve.check import Load, send_load
from hfbatch.serve.plan import make_plan
from hfbatch.serve.run import serving
from hfbatch.spec.job import ServeSpec
from tests.benchmarks import tools
from tests.benchmarks.corpus import generate

PORT = 8765


def peer(model: str) -> Any:
    """The application of a user: a route that calls the pipeline, which runs in FastAPI's pool of threads."""
    from fastapi import FastAPI
    from transformers import pipeline

    answer = pipeline("feature-extraction", model=model, dtype="float32")
    app = FastAPI()

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/predict")
    def predict(body: dict[str, Any]) -> dict[str, Any]:
        found = answer([row["text"] for row in body["rows"]], return_tensors=True)
        vectors = [one[0].mean(dim=0) for one in found]
        return {"rows": [{"embedding": (vector / vector.norm()).tolist()} for vector in vectors]}

    return app


@contextmanager
def peer_running(model: str) -> Iterator[str]:
    """The peer in a process of its own; its URL."""
    server = subprocess.Popen([sys.executable, "-m", "tests.benchmarks.serve", "--peer", model])
    url = f"http://127.0.0.1:{PORT}"
    try:
        while True:
            try:
                requests.get(f"{url}/health", timeout=1)
                break
            except requests.ConnectionError:
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait()


def measure(url: str, name: str, rows: list[dict[str, Any]], clients: int) -> Load:
    """A small load first, then the one that counts."""
    asyncio.run(send_load(name, f"{url}/predict", rows, 8))
    return asyncio.run(send_load(name, f"{url}/predict", rows, clients))


def texts_of(source: str | None) -> list[str]:
    """Texts of a Parquet file with a column `text`, or made ones."""
    if source:
        return pq.read_table(source, columns=["text"])["text"].slice(0, 1000).to_pylist()
    return generate(1000).to_pylist()


def main() -> None:
    """Prints a line for each contestant and number of clients."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--source", help="Parquet file with a column text; default: made texts")
    arguments.add_argument("--clients", type=int, nargs="+", default=[1, 200], help="concurrent clients")
    arguments.add_argument("--engine", default="torch", help="of hfbatch, such as openvino")
    arguments.add_argument("--peer", metavar="MODEL", help="run the peer")
    given = arguments.parse_args()
    if given.peer:
        import uvicorn

        uvicorn.run(peer(given.peer), host="127.0.0.1", port=PORT, log_level="error")
        return
    model = tools.minilm()
    rows = [{"text": text} for text in texts_of(given.source)]
    values = {"name": model, "dtype": "float32"}
    spec = {
        "task": "embedding",
        "model": values,
        "engine": given.engine,
        "serve": {"name": "minilm", "port": PORT},
    }
    loads: dict[tuple[str, int], Load] = {}
    with peer_running(model) as url:
        for clients in given.clients:
            loads["pipeline", clients] = measure(url, "pipeline", rows, clients)
    with serving([make_plan(ServeSpec.build(spec))], "local") as (url,):
        for clients in given.clients:
            loads["hfbatch", clients] = measure(url, "hfbatch", rows, clients)
    for (name, clients), load in loads.items():
        shown = {
            key: round(value, 1) if isinstance(value, float) else value
            for key, value in load.to_values().items()
        }
        ratio = load.rate / loads["pipeline", clients].rate
        print(json.dumps({**shown, "contestant": name, "clients": clients, "ratio": round(ratio, 2)}))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

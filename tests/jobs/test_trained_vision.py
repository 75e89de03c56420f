"""A small ViT, fine-tuned here on real handwritten digits, names digits that it has not seen."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTImageProcessorPil

from tests.train.tools import train_and_predict

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HELD_OUT = 397


def scans() -> pa.Table:
    """The 1,797 digits of 8 by 8 pixels that come with scikit-learn, shuffled, as PNG."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = [png((one * 15.9).astype(np.uint8)) for one in digits.images[order]]
    return pa.table({"image": images, "label": [NAMES[digit] for digit in digits.target[order]]})


def png(grey: np.ndarray) -> bytes:
    target = BytesIO()
    Image.fromarray(grey).save(target, "PNG")
    return target.getvalue()


@pytest.mark.timeout(200)
def test_a_trained_model_names_digits_that_it_has_not_seen(tmp_path: Path) -> None:
    rows, model = scans(), tmp_path / "new"
    ViTConfig(
        image_size=8, patch_size=4, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    ).save_pretrained(model)  # fmt: skip
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(model)
    metrics, found = train_and_predict(
        "image-classification", {"name": str(model), "scratch": True}, tmp_path, rows[HELD_OUT:], rows[:HELD_OUT],
        batch={"size": 64}, schedule={"epochs": 7, "learning_rate": 3e-3},
    )  # fmt: skip
    best = [labels[0] for labels in found["label"].to_pylist()]
    right = np.array(best) == rows["label"].to_pylist()[:HELD_OUT]
    assert right.mean() >= 0.9
    assert right.mean() == pytest.approx(metrics["best"]["accuracy"])
    scores = np.array([row[:2] for row in found["score"].to_pylist()])
    assert scores[right, 0].mean() > scores[~right, 0].mean()

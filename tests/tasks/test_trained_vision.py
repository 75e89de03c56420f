"""A small ViT, trained here on real handwritten digits, names digits that it has not seen."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hfbatch.tasks import task_class
from tests.tasks.drive import make, run

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HELD_OUT, EPOCHS, BATCH = 397, 16, 64


def scans() -> tuple[list[Image.Image], np.ndarray]:
    """The 1,797 digits of 8 by 8 pixels that come with scikit-learn, shuffled, and which digits they are."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    grey = (digits.images[order] * 15.9).astype(np.uint8)
    return [Image.fromarray(one).convert("RGB") for one in grey], digits.target[order]


def train(folder: Path, images: list[Image.Image], answers: np.ndarray) -> None:
    """Trains a model from scratch and saves it."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128, id2label=dict(enumerate(NAMES)), label2id={name: k for k, name in enumerate(NAMES)},
    )  # fmt: skip
    model = ViTForImageClassification(config).train()
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    pixels, labels = processor(images, return_tensors="pt")["pixel_values"], torch.from_numpy(answers)
    steps = EPOCHS * -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            model(pixel_values=pixels[rows], labels=labels[rows]).loss.backward()
            optimizer.step()
            schedule.step()
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def png(image: Image.Image) -> bytes:
    target = BytesIO()
    image.save(target, "PNG")
    return target.getvalue()


@pytest.mark.timeout(200)
def test_a_trained_model_names_digits_that_it_has_not_seen(tmp_path: Path) -> None:
    images, answers = scans()
    train(tmp_path, images[HELD_OUT:], answers[HELD_OUT:])
    task = make(task_class("image-classification"), str(tmp_path), top_k=2)
    found = run(task, {"image": [png(image) for image in images[:HELD_OUT]]}, 32)
    best = [labels[0] for labels in found["label"].to_pylist()]
    right = np.array([NAMES.index(name) for name in best]) == answers[:HELD_OUT]
    assert right.mean() >= 0.9
    scores = np.array(found["score"].to_pylist())
    assert scores[right, 0].mean() > scores[~right, 0].mean()

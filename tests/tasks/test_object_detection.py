"""Boxes are those of the transformers pipeline, in images of mixed sizes and with labels of each row's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import pipeline

from hfbatch.tasks import task_class
from tests.models.images import image_files, opened, tiny_detr
from tests.models.vision import tiny_vision
from tests.tasks.drive import make, run

FILES = image_files(12)


def assert_alike(got: list[Any], expected: list[Any]) -> None:
    """The same objects in the same order, with scores within 1e-4."""
    assert len({tuple(one["label"] for one in row) for row in expected}) > 2
    for row, want in zip(got, expected, strict=True):
        assert [one["label"] for one in row] == [one["label"] for one in want]
        np.testing.assert_allclose([one["score"] for one in row], [one["score"] for one in want], atol=1e-4)
        assert [one["box"] for one in row] == [one["box"] for one in want]


def test_a_detr_sees_images_of_mixed_sizes_as_it_sees_each_alone(tmp_path: Path) -> None:
    folder = tiny_detr(tmp_path, {0: "tram", 1: "tree", 2: "dog"})
    task = make(task_class("object-detection"), folder, threshold=0.4)
    assert task.check() == []
    oracle = pipeline("object-detection", folder, device="cpu", threshold=0.4)
    expected = [oracle(opened(file)) for file in FILES]
    assert_alike(run(task, {"image": FILES})["objects"].to_pylist(), expected)


LABELS = [["a tree"], ["work", "dawn", "the river"], ["mathematics of the night", "a tree"], []]


def test_every_image_may_have_labels_of_its_own(tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, "OwlViTForObjectDetection")
    oracle = pipeline("zero-shot-object-detection", folder, device="cpu")
    options = {"threshold": 0.05, "top_k": 4}
    labels = [LABELS[k % len(LABELS)] for k in range(len(FILES))]
    task = make(task_class("zero-shot-object-detection"), folder, candidate_labels=["never"], **options)
    found = run(task, {"image": FILES, "candidate_labels": labels})["objects"].to_pylist()
    expected = [
        oracle(opened(file), candidate_labels=own, **options) if own else []
        for file, own in zip(FILES, labels, strict=True)
    ]
    assert_alike(found, expected)


def test_somebody_has_to_say_what_to_look_for(tmp_path: Path) -> None:
    kind, folder = task_class("zero-shot-object-detection"), str(tmp_path)
    (fault,) = make(kind, folder).column_faults({"image"})
    assert "no labels to detect" in fault
    assert make(kind, folder).column_faults({"image", "candidate_labels"}) == []
    assert make(kind, folder, candidate_labels=["a tree"]).column_faults({"image"}) == []

"""Matches of two images are those that the model's documented use finds, row for row, whatever the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForKeypointMatching, pipeline

from hfbatch.data.media_files import RowFiles
from hfbatch.tasks import task_class
from tests.models.images import image_files, opened, tiny_matcher
from tests.tasks.drive import features_of, make, run

FILES = image_files(24)
PAIRS = {"image_0": FILES[:12], "image_1": FILES[12:]}


def matches_of(
    model: Any, processor: Any, pair: tuple[bytes, ...], threshold: float
) -> list[tuple[Any, ...]]:
    """What the documentation of SuperGlue does with a pair: first point, second point and score, best first."""
    images = [opened(file).convert("RGB") for file in pair]
    with torch.no_grad():
        outputs = model(**processor(images, return_tensors="pt"))
    sizes = [[(image.height, image.width) for image in images]]
    (one,) = processor.post_process_keypoint_matching(outputs, sizes, threshold=threshold)
    names = ("keypoints0", "keypoints1", "matching_scores")
    matches = zip(*(one[name].tolist() for name in names), strict=True)
    return sorted(((tuple(a), tuple(b), score) for a, b, score in matches), key=lambda match: -match[2])


def expected_of(folder: str, threshold: float) -> list[list[tuple[Any, ...]]]:
    """Matches of every pair."""
    model = AutoModelForKeypointMatching.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    found = [matches_of(model, processor, pair, threshold) for pair in zip(*PAIRS.values(), strict=True)]
    assert len({tuple(match[:2] for match in row) for row in found}) > 6
    return found


def plain(matches: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    points = ("keypoint_image_0", "keypoint_image_1")
    return [(*(tuple(match[point].values()) for point in points), match["score"]) for match in matches]


def assert_alike(got: list[tuple[Any, ...]], want: list[tuple[Any, ...]]) -> None:
    np.testing.assert_allclose([match[2] for match in got], [match[2] for match in want], atol=1e-4)
    assert [match[:2] for match in got] == [match[:2] for match in want]


@pytest.mark.parametrize(("kind", "threshold"), [("SuperGlue", 0.0), ("SuperGlue", 0.1), ("LightGlue", 0.0)])
def test_matches_are_those_of_the_model(tmp_path: Path, kind: str, threshold: float) -> None:
    folder = tiny_matcher(tmp_path, kind)
    task = make(task_class("keypoint-matching"), folder, threshold=threshold)
    assert task.check() == []
    found = run(task, PAIRS)["matches"].to_pylist()
    for got, want in zip(found, expected_of(folder, threshold), strict=True):
        assert_alike(plain(got), want)


def test_matches_in_square_images_are_those_of_the_pipeline(tmp_path: Path) -> None:
    folder = tiny_matcher(tmp_path / "model", "SuperGlue")
    task = make(task_class("keypoint-matching"), folder, files=RowFiles(str(tmp_path)))
    images = [opened(file).convert("RGB").resize((40, 40)) for file in FILES[:8]]
    for k, image in enumerate(images):
        image.save(tmp_path / f"{k}.png")
    pairs = {"image_0": [f"{k}.png" for k in range(4)], "image_1": [f"{k}.png" for k in range(4, 8)]}
    oracle = pipeline("keypoint-matching", folder, device="cpu")
    for k, got in enumerate(run(task, pairs)["matches"].to_pylist()):
        assert_alike(plain(got), plain(oracle([images[k], images[k + 4]])))


def test_the_example_runs_and_what_is_no_image_is_an_error(tmp_path: Path) -> None:
    kind = task_class("keypoint-matching")
    task = make(
        kind, tiny_matcher(tmp_path, "SuperGlue"), files=RowFiles(str(tmp_path)), **kind.EXAMPLE.params
    )
    for (name,) in kind.EXAMPLE.rows.values():
        opened(FILES[0]).save(tmp_path / name)
    assert run(task, kind.EXAMPLE.rows).num_rows == 1
    with pytest.raises(ValueError, match="not an image"):
        features_of(task, {"image_0": FILES[:1], "image_1": [b"GIF89a but not really"]})

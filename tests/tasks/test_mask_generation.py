"""Masks of everything are those of the transformers pipeline, row for row, whatever the batch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoImageProcessor, AutoModelForMaskGeneration, Sam2Config, pipeline
from transformers.models.sam.image_processing_pil_sam import _mask_to_rle, _rle_to_mask

from hfbatch.data.media_files import RowFiles
from hfbatch.tasks import task_class
from hfbatch.tasks.vision.masks import distinct, from_rle, to_rle
from tests.models.images import image_files, opened, tiny_sam
from tests.tasks.drive import features_of, make, run

FILES = image_files(18)[8:]
LOOSE = {"pred_iou_thresh": 0.3, "stability_score_thresh": 0.6, "stability_score_offset": 0.01}
"""Masks of random weights are worse than those of trained ones."""


def suppress(boxes: list[list[float]], scores: list[float], most: float) -> list[int]:
    """Non-maximum suppression as a textbook has it: the best box takes away those that overlap it too much."""

    def overlap(a: list[float], b: list[float]) -> float:
        width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        shared = max(width, 0) * max(height, 0)
        area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
        return shared / (sum(area) - shared) if sum(area) > shared else 0.0

    kept: list[int] = []
    for k in sorted(range(len(boxes)), key=lambda k: -scores[k]):
        if all(overlap(boxes[k], boxes[better]) <= most for better in kept):
            kept.append(k)
    return kept


def expected_of(folder: str, files: list[bytes], **options: Any) -> list[list[dict[str, Any]]]:
    """Masks of every image by the pipeline; torchvision, which it needs at its end, is stood in for."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def finish(masks: list[Any], scores: Any, boxes: Any, most: float) -> tuple[Any, ...]:
        kept = suppress(boxes.tolist(), scores.tolist(), most)
        return [_rle_to_mask(masks[k]) for k in kept], scores[kept], [masks[k] for k in kept], boxes[kept]

    processor.post_process_for_mask_generation = finish
    model = AutoModelForMaskGeneration.from_pretrained(folder).eval()
    oracle = pipeline("mask-generation", model, image_processor=processor, device="cpu")
    found = []
    for file in files:
        out = oracle(opened(file), output_bboxes_mask=True, output_rle_mask=True, **options)
        parts = zip(out["masks"], out["scores"], out["bounding_boxes"], out["rle_mask"], strict=True)
        found.append(
            [
                {"mask": mask, "score": float(score), "box": [int(side) for side in box], "rle": rle}
                for mask, score, box, rle in parts
            ]
        )
    assert len({tuple(map(tuple, (one["box"] for one in row))) for row in found}) > 5
    assert max(map(len, found)) > 2
    return found


def assert_alike(got: list[Any], expected: list[Any], form: str) -> None:
    for row, want in zip(got, expected, strict=True):
        np.testing.assert_allclose([m["score"] for m in row], [m["score"] for m in want], atol=1e-4)
        assert [list(m["box"].values()) for m in row] == [m["box"] for m in want]
        for mask, other in zip(row, want, strict=True):
            if form == "rle":
                assert mask["mask"] == other["rle"]
            else:
                image_file = opened(mask["mask"])
                assert (image_file.format, image_file.mode) == ("PNG", "L")
                np.testing.assert_array_equal(np.asarray(image_file), other["mask"] * 255)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_sam(tmp_path_factory.mktemp("sam"))


@pytest.mark.parametrize(
    ("options", "ways"),
    [
        ({"points_per_crop": 4, "mask_threshold": 0.3}, [(1, "png"), (8, "rle")]),
        (
            {"points_per_crop": 2, "points_per_batch": 3, "crops_n_layers": 1, "crops_nms_thresh": 0.9},
            [(8, "rle")],
        ),
    ],
    ids=["whole", "crops"],
)
def test_masks_are_those_of_the_pipeline(
    folder: str, options: dict[str, Any], ways: list[tuple[int, str]]
) -> None:
    expected = expected_of(folder, FILES, **LOOSE, **options)
    for size, form in ways:
        task = make(task_class("mask-generation"), folder, mask_format=form, **LOOSE, **options)
        assert task.check() == []
        assert_alike(run(task, {"image": FILES}, size)["masks"].to_pylist(), expected, form)


def test_masks_of_a_model_with_two_kinds_of_embeddings(tmp_path: Path) -> None:
    folder = tiny_sam(tmp_path, "SamHQ")
    options = {"points_per_crop": 3, "mask_threshold": 0.3}
    task = make(task_class("mask-generation"), folder, mask_format="rle", **LOOSE, **options)
    got = run(task, {"image": FILES}, 8)["masks"].to_pylist()
    assert_alike(got, expected_of(folder, FILES, **LOOSE, **options), "rle")


def test_without_masks_the_answer_is_empty(folder: str) -> None:
    task = make(task_class("mask-generation"), folder, points_per_crop=2, mask_threshold=1e6)
    assert run(task, {"image": FILES[:2]})["masks"].to_pylist() == [[], []]


def test_the_example_runs_on_files_beside_the_rows(folder: str, tmp_path: Path) -> None:
    kind = task_class("mask-generation")
    task = make(kind, folder, files=RowFiles(str(tmp_path)), **kind.EXAMPLE.params)
    for name in kind.EXAMPLE.rows["image"]:
        opened(FILES[0]).save(tmp_path / name)
    assert run(task, kind.EXAMPLE.rows)["masks"].type == task.output_fields()[0].type
    with pytest.raises(ValueError, match="not an image"):
        features_of(task, {"image": [b"GIF89a but not really"]})


@pytest.mark.skipif(bool(find_spec("torchvision")), reason="tells of a machine without torchvision")
def test_a_model_whose_processor_needs_torchvision_is_refused(tmp_path: Path) -> None:
    Sam2Config().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Sam2ImageProcessor"}')
    (fault,) = make(task_class("mask-generation"), str(tmp_path)).check()
    assert "torchvision: Sam2ImageProcessor" in fault


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**36 - 1))
def test_run_lengths_are_those_of_coco_and_come_back(height: int, width: int, bits: int) -> None:
    import torch

    mask = np.array([bits >> k & 1 for k in range(height * width)], bool).reshape(height, width)
    rle = to_rle(mask)
    assert rle == _mask_to_rle(torch.from_numpy(mask)[None])[0]
    np.testing.assert_array_equal(from_rle(rle), mask)


@given(st.lists(st.tuples(*[st.integers(0, 8)] * 5), max_size=12), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_boxes_that_overlap_a_better_one_go(boxes: list[tuple[int, ...]], most: float) -> None:
    made = np.array([[x, y, x + w, y + h] for x, y, w, h, _ in boxes], np.float32).reshape(-1, 4)
    scores = np.array([box[4] for box in boxes], np.float32)
    assert distinct(made, scores, most).tolist() == suppress(made.tolist(), scores.tolist(), most)

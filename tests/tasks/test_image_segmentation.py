"""Segments are those of the transformers pipeline, in each subtask and each format of masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from transformers import pipeline

from hfbatch.tasks import task_class
from hfbatch.tasks.vision.masks import RLE, from_rle
from tests.models.images import image_files, opened, tiny_maskformer
from tests.tasks.drive import make, run

FILES = image_files(17)[5:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    names = {0: "road", 1: "tram", 2: "tree"}
    return tiny_maskformer(tmp_path_factory.mktemp("maskformer"), names)


def mask_of(value: Any) -> np.ndarray:
    """A mask of either format: bool [height, width]."""
    return from_rle(value) if isinstance(value, dict) else np.asarray(opened(value)) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"subtask": "instance", "threshold": 0.3},
        {"subtask": "panoptic", "threshold": 0.3, "overlap_mask_area_threshold": 0.1},
        {"subtask": "semantic"},
    ],
    ids=lambda options: options["subtask"],
)
def test_segments_are_those_of_the_pipeline_in_both_formats_of_masks(
    folder: str, options: dict[str, Any]
) -> None:
    oracle = pipeline("image-segmentation", folder, device="cpu", **options)
    expected = [oracle(opened(file)) for file in FILES]
    assert len({tuple(one["label"] for one in row) for row in expected}) > 3
    for form in ("png", "rle"):
        task = make(task_class("image-segmentation"), folder, mask_format=form, **options)
        table = run(task, {"image": FILES})
        assert table["segments"].type.value_type.field("mask").type == (RLE if form == "rle" else pa.binary())
        for got, want in zip(table["segments"].to_pylist(), expected, strict=True):
            assert [one["label"] for one in got] == [one["label"] for one in want]
            for segment, other in zip(got, want, strict=True):
                assert segment["score"] == (other["score"] and pytest.approx(other["score"], abs=1e-4))
                np.testing.assert_array_equal(mask_of(segment["mask"]), np.asarray(other["mask"]) > 0)

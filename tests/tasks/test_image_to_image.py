"""Images are made larger as the documented use of the model makes them, row for row, whatever the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, Swin2SRForImageSuperResolution

from hfbatch.data.media_files import RowFiles
from hfbatch.tasks import task_class
from tests.models.images import image_files, opened, tiny_swin2sr
from tests.tasks.drive import features_of, make, run

FILES = image_files(12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_swin2sr(tmp_path_factory.mktemp("swin2sr"))


@pytest.fixture(scope="module")
def expected(folder: str) -> list[np.ndarray]:
    """What the documentation of Swin2SR does with each image: uint8 [height, width, 3]."""
    model = Swin2SRForImageSuperResolution.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    found = []
    for file in FILES:
        with torch.no_grad():
            outputs = model(**processor(opened(file).convert("RGB"), return_tensors="pt"))
        values = outputs.reconstruction.data.squeeze().float().cpu().clamp_(0, 1).numpy()
        found.append((np.moveaxis(values, 0, -1) * 255.0).round().astype(np.uint8))
    assert len({image_file.shape for image_file in found}) > 5
    assert min(image_file.std() for image_file in found) > 5
    return found


@pytest.mark.parametrize("crop", [False, True])
def test_images_are_those_of_the_model(
    folder: str,
    expected: list[np.ndarray],
    crop: bool,
) -> None:
    task = make(task_class("image-to-image"), folder, crop=crop)
    assert task.check() == []
    for got, whole, file in zip(
        run(task, {"image": FILES})["generated_image"].to_pylist(), expected, FILES, strict=True
    ):
        width, height = opened(file).size
        want = whole[: 2 * height, : 2 * width] if crop else whole
        image_file = np.asarray(opened(got)).astype(int)
        assert opened(got).format == "PNG"
        assert image_file.shape == want.shape
        assert np.abs(image_file - want).max() <= 1


def test_what_is_no_image_is_an_error(folder: str) -> None:
    with pytest.raises(ValueError, match="not an image"):
        features_of(make(task_class("image-to-image"), folder), {"image": [b"GIF89a but not really"]})


def test_the_example_runs_on_files_beside_the_rows(folder: str, tmp_path: Path) -> None:
    kind = task_class("image-to-image")
    task = make(kind, folder, files=RowFiles(str(tmp_path)), **kind.EXAMPLE.params)
    for name in kind.EXAMPLE.rows["image"]:
        opened(FILES[0]).save(tmp_path / name)
    (made,) = run(task, kind.EXAMPLE.rows)["generated_image"].to_pylist()
    assert opened(made).size == tuple(2 * side for side in opened(FILES[0]).size)

"""Training image-classification: images are read as the task reads them, losses are those of transformers."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hfbatch.data.media_files import RowFiles
from tests.models.vision import tiny_vision
from tests.train.drive import Bench

TASK, VIT = "image-classification", "ViTForImageClassification"
KINDS: dict[str, list[Any]] = {
    "single": ["dark", "light", "dark", "light", "dark", "light"],
    "multi": [["dark", "odd"], ["light"], [], ["light", "odd"], ["dark"], ["odd"]],
    "regression": [0.1, 0.9, 0.2, 0.8, 0.0, 1.0],
}


def image_file(number: int, kind: str = "PNG") -> bytes:
    """A noisy image of its own size, light if its number is odd."""
    random = np.random.default_rng(number)
    pixels = random.integers(0, 100, (20 + 7 * number, 50 - 3 * number, 3)) + 150 * (number % 2)
    target = BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(target, kind)
    return target.getvalue()


IMAGE_FILES = [image_file(number) for number in range(6)]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_vision(tmp_path_factory.mktemp("vit"), VIT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_transformers(vit: str, kind: str) -> None:
    bench = Bench(TASK, vit, {"image": IMAGE_FILES, "label": KINDS[kind]}).ready()
    batch = bench.batch()
    assert batch["pixel_values"].dtype == torch.uint8
    bench.model.save_pretrained(Path(vit).parent / kind)
    plain = transformers.ViTForImageClassification.from_pretrained(Path(vit).parent / kind)
    processor = transformers.AutoImageProcessor.from_pretrained(vit, backend="pil")
    images = [Image.open(BytesIO(one)) for one in IMAGE_FILES]
    expected = plain(**processor(images, return_tensors="pt"), labels=batch["labels"]).loss
    torch.testing.assert_close(bench.loss(batch), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_same_loss_however_it_is_cut(vit: str, kind: str) -> None:
    bench = Bench(TASK, vit, {"image": IMAGE_FILES, "label": KINDS[kind]}).ready()
    whole = bench.batch()
    items = int(whole["labels"].ne(-100).sum())
    parts = [bench.loss(bench.batch(*numbers), items) for numbers in ([0], [1, 2, 3], [4, 5])]
    torch.testing.assert_close(sum(parts), bench.loss(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_rows_improves_the_metrics(vit: str, kind: str) -> None:
    bench = Bench(TASK, vit, {"image": IMAGE_FILES, "label": KINDS[kind]}).ready()
    first, last = bench.learn(steps=60, rate=2e-3)
    assert last < first / 2
    assert bench.metrics()[bench.recipe.metric] > 0.9


def test_bytes_paths_and_structs_are_the_same_images(vit: str, tmp_path: Path) -> None:
    for number, data in enumerate(IMAGE_FILES):
        (tmp_path / f"{number}.png").write_bytes(data)
    paths = [f"{number}.png" for number in range(6)]
    structs = [{"bytes": None, "path": path} for path in paths]
    batches = []
    for images in (IMAGE_FILES, paths, structs):
        bench = Bench(TASK, vit, {"image": images, "label": KINDS["single"]}, RowFiles(str(tmp_path)))
        batches.append(bench.ready().batch()["pixel_values"])
    assert all(torch.equal(batches[0], batch) for batch in batches[1:])


def test_broken_images_are_faults_with_file_and_row(vit: str) -> None:
    jpeg = image_file(1, "JPEG")
    images = [IMAGE_FILES[0], None, b"no picture", jpeg[: len(jpeg) // 2], IMAGE_FILES[1][:-40], jpeg]
    faults = Bench(TASK, vit, {"image": images, "label": ["a", "b", "a", "b", None, "a"]}).validate().faults
    starts = [
        "rows.parquet row 4: label is null",
        "rows.parquet row 1: image is null",
        "rows.parquet row 2: image cannot be used: not an image of a known format (10 bytes)",
        "rows.parquet row 3: image cannot be used: not an image that can be read",
        "rows.parquet row 4: image cannot be used: not an image that can be read",
    ]
    assert len(faults) == len(starts)
    assert all(fault.startswith(start) for fault, start in zip(faults, starts, strict=True)), faults


def test_flips_mirror_some_images_in_training_alone(vit: str) -> None:
    columns = {"image": IMAGE_FILES, "label": KINDS["single"]}
    plain, flipped = (Bench(TASK, vit, columns, params={"flip": flip}).ready() for flip in (False, True))
    seen: list[torch.Tensor] = []
    for bench in (plain, flipped):
        bench.model.vit.embeddings.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    plain.loss(plain.batch())
    flipped.loss(flipped.batch())
    assert torch.equal(seen[0], seen[1])
    flipped.model.train()
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        flipped.loss(flipped.batch())
    mirrored = [
        [torch.equal(one, other) for one, other in zip(x, seen[0].flip(-1), strict=True)] for x in seen[2:]
    ]
    assert mirrored[0] == mirrored[1] != mirrored[2]
    assert 0 < sum(mirrored[0]) < len(IMAGE_FILES)


def test_an_image_processor_that_leaves_several_sizes_is_refused(tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, "Dinov2ForImageClassification")
    (fault,) = Bench(TASK, folder, {"image": IMAGE_FILES, "label": KINDS["single"]}).recipe.check()
    assert "returns images of several sizes, such as 3×32×" in fault


def test_the_config_and_the_image_processor_are_enough_to_begin_with(vit: str, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((Path(vit) / name).read_text())
    model = {"name": str(tmp_path), "scratch": True}
    bench = Bench(TASK, tmp_path, {"image": IMAGE_FILES, "label": KINDS["single"]}, model=model).ready()
    bench.recipe.processor.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "preprocessor_config.json").exists()
    assert bench.model.config.id2label == {0: "dark", 1: "light"}

"""Tasks that go through their pipeline give its answers, row for row, whatever the batch."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers import pipeline

from hfbatch.data.media_files import RowFiles
from hfbatch.tasks import task_class
from hfbatch.tasks.model_support import misfits
from hfbatch.tasks.pipelines.serialization import dump, load
from tests.cases.case import near
from tests.cases.vision import image_files, png
from tests.models.text import CORPUS, tiny_bert_encoder, tiny_bert_for
from tests.models.vision import tiny_vision
from tests.tasks.drive import features_of, make, measured, run

TEXTS = [*CORPUS[:7], "", "river " * 200, "Numbers, numbers: 10:45!", *CORPUS[40:43]]
LABELS = ["weather", "work", "mathematics of the night"]
TAGS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
NLI = {0: "contradiction", 1: "neutral", 2: "entailment"}


def assert_alike(table: pa.Table, expected: list[Any]) -> None:
    rows = [tuple(row.values()) for row in table.to_pylist()]
    assert len(rows) == len(expected) >= 12
    for got, want in zip(rows, expected, strict=True):
        assert near(got, want), (got, want)


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_token_classification(tmp_path: Path, strategy: str) -> None:
    folder = tiny_bert_for(tmp_path, "TokenClassification", id2label=TAGS)
    task = make(task_class("ner"), folder, aggregation_strategy=strategy)
    oracle = pipeline("token-classification", folder, device="cpu", aggregation_strategy=strategy)
    oracle.tokenizer.model_max_length = 64
    assert_alike(run(task, {"text": TEXTS}), [(oracle(text),) for text in TEXTS])
    assert features_of(task, {"text": TEXTS}).truncated == 1


def test_token_classification_of_long_texts_and_of_words(tmp_path: Path) -> None:
    folder = tiny_bert_for(tmp_path, "TokenClassification", id2label=TAGS)
    options = {"aggregation_strategy": "simple", "stride": 8}
    oracle = pipeline("token-classification", folder, device="cpu", **options)
    oracle.tokenizer.model_max_length = 64
    task = make(task_class("token-classification"), folder, **options)
    assert_alike(run(task, {"text": TEXTS}), [(oracle(text),) for text in TEXTS])
    assert features_of(task, {"text": TEXTS}).truncated == 0
    words = [text.split() or ["none"] for text in TEXTS]
    task = make(task_class("token-classification"), folder, aggregation_strategy="first")
    oracle = pipeline("token-classification", folder, device="cpu", aggregation_strategy="first")
    oracle.tokenizer.model_max_length = 64
    expected = [tuple(oracle(row, is_split_into_words=True, delimiter=" ")) for row in words]
    assert_alike(run(task, {"words": words}), expected)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"targets": ["river", "model"]}])
def test_fill_mask(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tiny_bert_for(tmp_path, "MaskedLM")
    texts = [text.replace("the", "[MASK]") if "the" in text else f"{text} [MASK]" for text in CORPUS[:12]]
    oracle = pipeline("fill-mask", folder, device="cpu", tokenizer_kwargs={"truncation": True}, **options)
    oracle.tokenizer.model_max_length = 64
    expected = []
    for text in texts:
        found = oracle(text)
        expected.append((found if isinstance(found[0], list) else [found],))
    task = make(task_class("fill-mask"), folder, **options)
    assert_alike(run(task, {"text": texts}), expected)


@pytest.mark.parametrize("layer", [None, 0, 1, -1])
def test_feature_extraction(tmp_path: Path, layer: int | None) -> None:
    folder = tiny_bert_encoder(tmp_path)
    oracle = pipeline("feature-extraction", folder, device="cpu", truncation=True)
    task = make(task_class("feature-extraction"), folder, layer=layer)
    assert task.check() == []
    found = run(task, {"text": TEXTS})["features"].to_pylist()
    for got, text in zip(found, TEXTS, strict=True):
        if layer is None:
            (expected,) = oracle(text)
        else:
            inputs = oracle.preprocess(text, truncation=True)
            expected = oracle.model(**inputs, output_hidden_states=True).hidden_states[layer][0].tolist()
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_text_without_a_mask_is_an_error(tmp_path: Path) -> None:
    task = make(task_class("fill-mask"), tiny_bert_for(tmp_path, "MaskedLM"))
    with pytest.raises(Exception, match="No mask_token"):
        features_of(task, {"text": ["nothing to fill"]})


@pytest.mark.parametrize("several", [False, True])
def test_zero_shot_classification(tmp_path: Path, several: bool) -> None:
    folder = tiny_bert_for(tmp_path, "SequenceClassification", id2label=NLI)
    options = {"candidate_labels": LABELS, "multi_label": several, "hypothesis_template": "It is about {}."}
    texts = [text for text in TEXTS if text]
    oracle = pipeline("zero-shot-classification", folder, device="cpu")
    oracle.tokenizer.model_max_length = 64
    expected = [oracle(text, **options) for text in texts]
    task = make(task_class("zero-shot-classification"), folder, **options)
    found = run(task, {"text": texts})
    assert_alike(found, [(one["labels"], one["scores"]) for one in expected])
    assert features_of(task, {"text": texts}).truncated == 1


def test_image_classification(tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, "ViTForImageClassification", id2label=NLI)
    files = image_files(12)
    oracle = pipeline("image-classification", folder, device="cpu", top_k=2)
    expected = [oracle(Image.open(BytesIO(file))) for file in files]
    task = make(task_class("image-classification"), folder, top_k=2)
    found = run(task, {"image": files})
    assert_alike(found, [([one["label"] for one in row], [one["score"] for one in row]) for row in expected])


def test_object_detection_of_images_of_mixed_sizes(tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, "YolosForObjectDetection", id2label=NLI)
    files = image_files(12)
    oracle = pipeline("object-detection", folder, device="cpu", threshold=0.3)
    expected = [(oracle(Image.open(BytesIO(file))),) for file in files]
    assert any(row[0] for row in expected)
    task = make(task_class("object-detection"), folder, threshold=0.3)
    assert_alike(run(task, {"image": files}), expected)


def test_depth_estimation(tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, "DPTForDepthEstimation")
    files = image_files(12)
    oracle = pipeline("depth-estimation", folder, device="cpu")
    expected = []
    for file in files:
        found = oracle(Image.open(BytesIO(file)))
        expected.append((found["predicted_depth"].tolist(), png(found["depth"])))
    table = run(make(task_class("depth-estimation"), folder), {"image": files})
    assert_alike(table, expected)


@pytest.mark.parametrize(
    "architecture", ["SegformerForSemanticSegmentation", "MaskFormerForInstanceSegmentation"]
)
def test_image_segmentation(tmp_path: Path, architecture: str) -> None:
    folder = tiny_vision(tmp_path, architecture, id2label=NLI)
    files = image_files(12)
    options = {} if "Semantic" in architecture else {"subtask": "instance", "threshold": 0.1}
    oracle = pipeline("image-segmentation", folder, device="cpu", **options)
    expected = []
    for file in files:
        found = oracle(Image.open(BytesIO(file)))
        expected.append(([{**one, "mask": png(one["mask"])} for one in found],))
    assert any(row[0] for row in expected)
    assert_alike(run(make(task_class("image-segmentation"), folder, **options), {"image": files}), expected)


def test_zero_shot_image_classification(tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, "CLIPModel")
    files = image_files(12)
    oracle = pipeline("zero-shot-image-classification", folder, device="cpu")
    expected = [oracle(Image.open(BytesIO(file)), candidate_labels=LABELS) for file in files]
    task = make(task_class("zero-shot-image-classification"), folder, candidate_labels=LABELS)
    found = run(task, {"image": files})
    assert_alike(found, [([one["label"] for one in row], [one["score"] for one in row]) for row in expected])


def test_zero_shot_object_detection(tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, "OwlViTForObjectDetection")
    files = image_files(12)
    oracle = pipeline("zero-shot-object-detection", folder, device="cpu")
    options = {"threshold": 0.05, "top_k": 4}
    expected = [(oracle(Image.open(BytesIO(file)), candidate_labels=LABELS, **options),) for file in files]
    assert any(row[0] for row in expected)
    task = make(task_class("zero-shot-object-detection"), folder, candidate_labels=LABELS, **options)
    assert_alike(run(task, {"image": files}), expected)


def test_images_come_as_bytes_paths_and_structs(tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path / "model", "ViTForImageClassification", id2label=NLI)
    file = image_files(1)[0]
    (tmp_path / "a.png").write_bytes(file)
    task = make(task_class("image-classification"), folder, files=RowFiles(str(tmp_path)))
    columns = [
        [file],
        ["a.png"],
        [str(tmp_path / "a.png")],
        [{"bytes": file, "path": "x"}],
        [{"bytes": None, "path": "a.png"}],
    ]
    answers = [run(task, {"image": column}).to_pylist() for column in columns]
    assert answers == [answers[0]] * len(columns)
    with pytest.raises(ValueError, match="not an image"):
        features_of(task, {"image": [b"GIF89a but not really"]})


def test_a_model_that_cannot_do_the_task_is_refused(tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, "ViTForImageClassification")
    for name in ("zero-shot-classification", "zero-shot-image-classification"):
        (fault,) = misfits(make(task_class(name), folder, candidate_labels=["a"]))
        assert f"does not support {name}" in fault


def test_the_number_of_the_report(tmp_path: Path) -> None:
    folder = tiny_bert_for(tmp_path, "SequenceClassification", id2label=NLI)
    task = make(task_class("zero-shot-classification"), folder, candidate_labels=LABELS)
    assert measured(task, {"text": CORPUS[:3]}).shape == (3,)


def test_what_is_packed_comes_back() -> None:
    value = {"a": [1, None, (2.5, "x")], "t": torch.arange(6).reshape(2, 3), "n": {"m": True}}
    back = load(dump(value))
    assert back["a"] == [1, None, (2.5, "x")]
    assert back.t.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert back["n"].m is True
    with pytest.raises(TypeError, match="object"):
        dump({"x": object()})

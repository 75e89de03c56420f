"""Images travel as bytes and become numbers on the device, and answers stay those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, pipeline

from hfbatch.engines.base import EngineConfig
from hfbatch.engines.torch import TorchEngine
from hfbatch.errors import SpecError, WorkerError
from hfbatch.hub.models import Model
from hfbatch.predict.plan import make_plan
from hfbatch.spec.job import JobSpec
from hfbatch.tasks import task_class
from hfbatch.tasks.vision.pixels import Pixels, as_arrays, can_stop_early, run_by_shape
from tests.cases.vision import LABELS, image_files
from tests.models.text import CORPUS, tiny_bert_encoder
from tests.models.vision import tiny_vision
from tests.tasks.drive import features_of, make, measured, run
from tests.tasks.test_pipeline_tasks import assert_alike

NAMES = {0: "cat", 1: "dog", 2: "bird", 3: "fish"}
FILES = image_files(12)
IMAGES = [Image.open(BytesIO(file)).convert("RGB") for file in FILES]
TEXTS = [*CORPUS[:10], "", "river " * 200]


def vectors(table: pa.Table, name: str = "embedding") -> np.ndarray:
    return np.array(table[name].to_pylist(), np.float32)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal within 1e-4, and no two rows alike, so that rows in another order would show."""
    np.testing.assert_allclose(found, expected, atol=1e-4)
    apart = np.abs(expected[:, None] - expected[None]).max(-1)
    assert (apart[~np.eye(len(expected), dtype=bool)] > 1e-3).all()


@torch.inference_mode()
def oracle(folder: str, encode: Callable[[Any, Any], torch.Tensor], inputs: list[Any]) -> np.ndarray:
    """What a model returns for each input alone: encode is given the model and one of inputs."""
    model = AutoModel.from_pretrained(folder).eval()
    return np.concatenate([encode(model, one).numpy() for one in inputs])


def seen(folder: str, pick: Callable[[Any, Any], torch.Tensor]) -> np.ndarray:
    """What pick takes of a model and its inputs, for each image."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return oracle(folder, lambda model, one: pick(model, processor(one, return_tensors="pt")), IMAGES)


def pooled(model: Any, inputs: Any) -> torch.Tensor:
    return model(**inputs).pooler_output.flatten(1)


def hidden(model: Any, inputs: Any) -> torch.Tensor:
    return model(**inputs).last_hidden_state


@pytest.mark.parametrize(
    "kind",
    ["ViT", "CLIP", "Siglip", "Bit", "ConvNext", "Beit", "DeiT", "Levit", "MobileNetV2", "MobileViT", "Segformer", "Yolos"],
)  # fmt: skip
def test_bytes_made_numbers_are_what_the_image_processor_gives(kind: str, tmp_path: Path) -> None:
    processor = getattr(transformers, f"{kind}ImageProcessorPil")()
    processor.save_pretrained(tmp_path)
    pixels = Pixels(Model(kind, str(tmp_path), "0"))
    features = pixels.features(IMAGES[:4])
    assert features.schema.field("pixel_values").type == pa.large_list(pa.uint8())
    for row, image in enumerate(IMAGES[:4]):
        batch = pixels.collate(features, np.array([row]))
        assert batch["0/pixel_values"].dtype == np.uint8
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        found = run_by_shape(tensors, torch.float32, dict)["pixel_values"][0].numpy()
        np.testing.assert_allclose(found, as_arrays(processor(image))["pixel_values"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["EfficientNet", "Owlv2", "Siglip2", "Sam"])
def test_processors_that_make_numbers_in_between_are_left_to_it(kind: str) -> None:
    assert not can_stop_early(getattr(transformers, f"{kind}ImageProcessorPil")())


@pytest.mark.parametrize(
    "settings",
    [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 100}, {"image_mean": [0.1, 0.2, 0.9]}],
)  # fmt: skip
def test_settings_of_the_image_processor_are_followed(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, "ViTForImageClassification", id2label=NAMES)
    AutoImageProcessor.from_pretrained(folder, backend="pil", **settings).save_pretrained(folder)
    task = make(task_class("image-classification"), folder)
    assert task.pixels.in_bytes
    assert_classified(task, folder)


def assert_classified(task: Any, folder: str, **options: Any) -> None:
    """The task's labels and scores are the pipeline's."""
    classify = pipeline("image-classification", folder, device="cpu", **options)
    expected = [classify(image) for image in IMAGES]
    lists = [([one["label"] for one in row], [one["score"] for one in row]) for row in expected]
    assert len({tuple(labels) for labels, _ in lists}) > 1
    assert_alike(run(task, {"image": FILES}), lists)


def test_classes_of_images_of_mixed_sizes(tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, "Dinov2ForImageClassification", id2label=NAMES)
    task = make(task_class("image-classification"), folder)
    shapes = features_of(task, {"image": FILES}).table["pixel_values/shape"].to_pylist()
    assert len({tuple(shape) for shape in shapes}) > 5
    assert_classified(task, folder)


def test_classes_of_images_that_travel_as_numbers(tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, "ViTForImageClassification", id2label=NAMES)
    transformers.EfficientNetImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    task = make(task_class("image-classification"), folder)
    assert (
        features_of(task, {"image": FILES}).table.schema.field("pixel_values").type.value_type == pa.float32()
    )
    assert_classified(task, folder)


@pytest.mark.parametrize(
    "options", [{"function_to_apply": "sigmoid"}, {"function_to_apply": "none"}, {"top_k": 99}]
)
def test_scores_are_made_as_the_pipeline_makes_them(options: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, "ViTForImageClassification", id2label=NAMES)
    assert_classified(make(task_class("image-classification"), folder, **options), folder, **options)


@pytest.mark.parametrize("architecture", ["ViTModel", "Dinov2Model"])
def test_vectors_of_patches(architecture: str, tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, architecture)
    task = make(task_class("image-feature-extraction"), folder)
    assert task.check() == []
    oracle = pipeline("image-feature-extraction", folder, device="cpu")
    found = run(task, {"image": FILES})["features"].to_pylist()
    assert (len({len(row) for row in found}) > 1) == (architecture == "Dinov2Model")
    for got, image in zip(found, IMAGES, strict=True):
        np.testing.assert_allclose(got, oracle(image)[0], atol=1e-4)


@pytest.mark.parametrize("architecture", ["ViTModel", "Dinov2Model", "ResNetModel"])
def test_one_vector_of_an_image(architecture: str, tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, architecture)
    task = make(task_class("image-feature-extraction"), folder, pool=True)
    assert task.check() == []
    oracle = pipeline("image-feature-extraction", folder, device="cpu", pool=True)
    expected = np.array([oracle(image)[0] for image in IMAGES], np.float32).reshape(len(IMAGES), -1)
    assert_close(vectors(run(task, {"image": FILES}), "features"), expected)
    assert measured(task, {"image": FILES[:3]}).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("architecture", "pool", "fault"),
    [("ResNetModel", False, "set params.pool to true"), ("ViTMAEModel", True, "set params.pool to false"),
     ("CLIPModel", False, "use task embedding")],
)  # fmt: skip
def test_a_model_without_such_vectors_is_refused(
    architecture: str, pool: bool, fault: str, tmp_path: Path
) -> None:
    task = make(task_class("image-feature-extraction"), tiny_vision(tmp_path, architecture), pool=pool)
    (found,) = task.check()
    assert fault in found


@pytest.mark.parametrize("name", ["embedding", "image-feature-extraction"])
def test_a_pooler_without_weights_is_an_error_where_it_is_used(name: str, tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, "ViTForImageClassification")
    uses, does_not = ({}, {"pooling": "cls"}) if name == "embedding" else ({"pool": True}, {})
    config = partial(EngineConfig, folder, "AutoModel", "float32")
    with pytest.raises(WorkerError, match="lack 2 layers of AutoModel, such as pooler"):
        TorchEngine(config(unused=make(task_class(name), folder, **uses).unused))
    TorchEngine(config(unused=make(task_class(name), folder, **does_not).unused))


@pytest.mark.parametrize("normalize", ["auto", True])
@pytest.mark.parametrize("architecture", ["CLIPModel", "SiglipModel"])
def test_texts_and_images_in_one_space(architecture: str, normalize: Any, tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, architecture)
    task = make(task_class("embedding"), folder, normalize=normalize)
    assert task.check() == []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"truncation": True, "max_length": 64, "return_tensors": "pt", "return_token_type_ids": False}
    if architecture == "SiglipModel":
        options |= {"padding": "max_length", "return_attention_mask": False}
    texts = oracle(
        folder, lambda model, text: model.get_text_features(**tokenizer(text, **options)).pooler_output, TEXTS
    )
    images = seen(folder, lambda model, inputs: model.get_image_features(**inputs).pooler_output)
    if normalize is True:
        texts, images = (found / np.linalg.norm(found, axis=1, keepdims=True) for found in (texts, images))
    assert_close(vectors(run(task, {"text": TEXTS})), texts)
    assert_close(vectors(run(task, {"image": FILES})), images)
    assert features_of(task, {"text": TEXTS}).truncated == 1


@pytest.mark.parametrize("architecture", ["ViTModel", "Dinov2Model"])
@pytest.mark.parametrize(
    ("pooling", "pick"),
    [
        ("auto", pooled),
        ("cls", lambda model, inputs: hidden(model, inputs)[:, 0]),
        ("mean", lambda model, inputs: hidden(model, inputs).mean(1)),
        ("max", lambda model, inputs: hidden(model, inputs).amax(1)),
    ],
)
def test_embeddings_by_a_model_of_images_alone(
    pooling: str, pick: Any, architecture: str, tmp_path: Path
) -> None:
    folder = tiny_vision(tmp_path, architecture)
    task = make(task_class("embedding"), folder, pooling=pooling)
    assert task.check() == []
    assert_close(vectors(run(task, {"image": FILES})), seen(folder, pick))
    norms = measured(task, {"image": FILES[:3]})
    np.testing.assert_allclose(norms, np.linalg.norm(seen(folder, pick)[:3], axis=1), rtol=1e-4)


def test_the_columns_of_embedding_go_by_the_model(tmp_path: Path) -> None:
    both = make(task_class("embedding"), tiny_vision(tmp_path / "clip", "CLIPModel"))
    assert [(column.name, column.required) for column in both.columns()] == [
        ("text", False),
        ("image", False),
    ]
    assert "--column image=COLUMN" in both.column_faults(set())[0]
    assert "--column image=image" in both.column_faults({"text", "image"})[0]
    assert both.column_faults({"image"}) == []
    for name, folder in (
        ("image", tiny_vision(tmp_path / "vit", "ViTModel")),
        ("text", tiny_bert_encoder(tmp_path / "bert")),
    ):
        task = make(task_class("embedding"), folder)
        assert [(column.name, column.required) for column in task.columns()] == [(name, True)]
        assert task.column_faults({name}) == []


def test_the_plan_reads_the_column_that_the_model_encodes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = {"id": range(3), "text": TEXTS[:3], "image": FILES[:3]}
    pq.write_table(pa.table(rows), tmp_path / "in" / "a.parquet")

    def plan(model: str, out: str, **columns: str) -> dict[str, str]:
        where = {"path": str(tmp_path / "in"), "columns": columns}
        spec = {"task": "embedding", "model": model, "input": where, "output": str(tmp_path / out)}
        return make_plan(JobSpec.build(spec)).inputs

    bert, clip = tiny_bert_encoder(tmp_path / "bert"), tiny_vision(tmp_path / "clip", "CLIPModel")
    assert plan(bert, "a") == {"text": "text"}
    assert plan(tiny_vision(tmp_path / "vit", "ViTModel"), "b") == {"image": "image"}
    assert plan(clip, "c", image="image") == {"image": "image"}
    with pytest.raises(SpecError, match="name the one to read"):
        plan(clip, "d")
    with pytest.raises(SpecError, match="no input 'image'"):
        plan(bert, "e", image="image")


def test_options_of_texts_are_refused_for_images(tmp_path: Path) -> None:
    clip, mae = tiny_vision(tmp_path / "clip", "CLIPModel"), tiny_vision(tmp_path / "mae", "ViTMAEModel")
    embedding = task_class("embedding")
    assert "leave params.pooling 'mean' out" in make(embedding, clip, pooling="mean").check()[0]
    assert "params.prompt" in make(embedding, clip, prompt="a photo of ").column_faults({"image"})[0]
    assert "set params.pooling to mean or cls" in make(embedding, mae).check()[0]


@pytest.mark.parametrize("architecture", ["CLIPModel", "SiglipModel", "CLIPSegModel"])
def test_labels_are_scored_as_the_pipeline_scores_them(architecture: str, tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, architecture)
    scorer = pipeline("zero-shot-image-classification", folder, device="cpu")
    options = {"candidate_labels": LABELS, "hypothesis_template": "A picture of {}!"}
    expected = [scorer(image, **options) for image in IMAGES]
    lists = [([one["label"] for one in row], [one["score"] for one in row]) for row in expected]
    assert len({round(scores[0], 3) for _, scores in lists}) > 1
    task = make(task_class("zero-shot-image-classification"), folder, **options)
    assert task.check() == []
    assert_alike(run(task, {"image": FILES}), lists)


def test_labels_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_vision(tmp_path, "CLIPModel")
    encode, calls = transformers.CLIPModel.get_text_features, []

    @wraps(encode)
    def counted(model: Any, **inputs: Any) -> Any:
        calls.append(len(inputs["input_ids"]))
        return encode(model, **inputs)

    monkeypatch.setattr(transformers.CLIPModel, "get_text_features", counted)
    run(
        make(task_class("zero-shot-image-classification"), folder, candidate_labels=LABELS),
        {"image": FILES},
        4,
    )
    assert calls == [len(LABELS)]


def test_labels_that_the_model_cannot_take_are_refused(tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, "CLIPModel")
    cls = task_class("zero-shot-image-classification")
    assert "no {}" in make(cls, folder, candidate_labels=["a"], hypothesis_template="a picture").check()[0]
    (fault,) = make(cls, folder, candidate_labels=["a", "river " * 70]).check()
    assert "shorten it" in fault


def test_an_image_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    task = make(task_class("image-classification"), tiny_vision(tmp_path, "ViTForImageClassification"))
    with pytest.raises(ValueError, match="not an image"):
        features_of(task, {"image": [FILES[0], b"text"]})

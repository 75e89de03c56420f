"""Which tasks a model can do, what `task: auto` means, and what names of tasks stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from hfbatch.errors import SpecError
from hfbatch.hub.models import Model
from hfbatch.tasks import TASKS, named, task_class
from hfbatch.tasks.base import TaskConfig
from hfbatch.tasks.model_support import fits, infer, misfits, tasks_of


def model_of(folder: Path, kind: str, *architectures: str, trust: bool = False, **more: Any) -> Model:
    """A model folder with a config alone."""
    config = getattr(transformers, f"{kind}Config")(architectures=list(architectures) or None, **more)
    config.save_pretrained(folder)
    return Model("m", str(folder), "0", trust)


@pytest.mark.parametrize(
    ("kind", "architecture", "task"),
    [
        ("Bert", "BertForSequenceClassification", "text-classification"),
        ("Bert", "BertForTokenClassification", "token-classification"),
        ("Bert", "BertForMaskedLM", "fill-mask"),
        ("Bert", "BertForPreTraining", "fill-mask"),
        ("Bert", "BertForQuestionAnswering", "question-answering"),
        ("Bert", "BertModel", "embedding"),
        ("Bart", "BartForConditionalGeneration", "text2text-generation"),
        ("Llama", "LlamaForCausalLM", "text-generation"),
        ("Llama", "LlamaForSequenceClassification", "text-classification"),
        ("T5", "T5ForConditionalGeneration", "text2text-generation"),
        ("T5", "T5EncoderModel", "embedding"),
        ("CLIP", "CLIPModel", "zero-shot-image-classification"),
        ("ViT", "ViTForImageClassification", "image-classification"),
        ("ViT", "ViTModel", "embedding"),
        ("Yolos", "YolosForObjectDetection", "object-detection"),
        ("Segformer", "SegformerForSemanticSegmentation", "image-segmentation"),
        ("Wav2Vec2", "Wav2Vec2ForCTC", "automatic-speech-recognition"),
    ],
)
def test_the_class_of_a_model_names_its_task(tmp_path: Path, kind: str, architecture: str, task: str) -> None:
    model = model_of(tmp_path, kind, architecture)
    assert infer(model) == (task, architecture)
    assert task in tasks_of(model)


TEXT = {"embedding", "feature-extraction", "multi-vector-embedding"}


@pytest.mark.parametrize(
    ("kind", "architecture", "able", "unable"),
    [
        ("Bert", "BertModel", TEXT, {"fill-mask", "text-classification", "image-classification"}),
        ("Bert", "BertForMaskedLM", {"fill-mask", "sparse-embedding", *TEXT}, {"text-classification", "text-generation"}),
        ("Bert", "BertForSequenceClassification", {"text-ranking", "zero-shot-classification", *TEXT}, {"fill-mask"}),
        ("Electra", "ElectraForPreTraining", TEXT, {"fill-mask"}),
        ("T5", "T5ForConditionalGeneration", {"summarization", "translation", *TEXT}, {"text-generation"}),
        ("Llama", "LlamaForCausalLM", {"text-generation", *TEXT}, {"summarization", "text-classification"}),
        ("Qwen2Audio", "Qwen2AudioForConditionalGeneration", set(), {"text2text-generation", "translation"}),
        ("ViT", "ViTForImageClassification", {"image-classification", "embedding", "image-feature-extraction"},
         {"object-detection", "feature-extraction"}),
        ("CLIP", "CLIPModel", {"zero-shot-image-classification", "embedding"}, {"image-classification"}),
        ("Vits", "VitsModel", set(), TEXT),
        ("Wav2Vec2", "Wav2Vec2ForSequenceClassification", {"audio-classification"}, TEXT),
    ],
)  # fmt: skip
def test_a_model_can_do_the_tasks_that_it_has_weights_for(
    tmp_path: Path, kind: str, architecture: str, able: set[str], unable: set[str]
) -> None:
    found = set(tasks_of(model_of(tmp_path, kind, architecture)))
    assert able <= found
    assert not unable & found


def test_a_model_that_cannot_do_the_task_is_reported_with_what_it_can_do(tmp_path: Path) -> None:
    task = task_class("fill-mask")
    model = model_of(tmp_path, "Bert", "BertForSequenceClassification")
    (fault,) = misfits(task(TaskConfig(model, task.Params())))
    assert fault.startswith(
        "model 'm' (BertForSequenceClassification) does not support fill-mask; it supports: "
    )
    assert fault.index("text-classification") < fault.index("embedding")
    assert not misfits(task(TaskConfig(model_of(tmp_path, "Bert", "BertForMaskedLM"), task.Params())))


@pytest.mark.parametrize("name", TASKS)
def test_the_classes_that_the_loader_of_a_task_knows_are_let_through(tmp_path: Path, name: str) -> None:
    cls = task_class(name)
    model = Model("m", str(tmp_path), "0")
    table = getattr(transformers, cls.auto_class)._model_mapping._model_mapping
    headed = [(kind, head) for kind, head in table.items() if isinstance(head, str)]
    headed = [(kind, head) for kind, head in headed if "audio" in cls.takes or "Audio" not in head][:3]
    for kind, architecture in [("bert", "BertModel")] if cls.auto_class == "AutoModel" else headed:
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": kind, "architectures": [architecture]})
        )
        expected = "text" in cls.takes or cls.auto_class != "AutoModel"
        assert fits(cls(TaskConfig(model, cls.Params.model_construct()))) == expected


def test_a_class_unknown_to_transformers_and_none_at_all_are_let_through(tmp_path: Path) -> None:
    cls = task_class("fill-mask")
    for architectures in (["BertForSomethingNew"], []):
        assert fits(cls(TaskConfig(model_of(tmp_path, "Bert", *architectures), cls.Params())))
    with pytest.raises(SpecError, match=r"do not name a single task; it supports: .*fill-mask"):
        infer(model_of(tmp_path, "Bert"))


def test_code_of_the_models_own_is_reckoned_with_only_where_it_is_trusted(tmp_path: Path) -> None:
    cls = task_class("text-generation")
    for trust in (True, False):
        model = model_of(
            tmp_path, "T5", "T5ForCausalLM", trust=trust, auto_map={"AutoModelForCausalLM": "modeling.Mine"}
        )
        assert fits(cls(TaskConfig(model, cls.Params()))) == trust


def test_files_and_cards_take_precedence_over_the_class(tmp_path: Path) -> None:
    model = model_of(tmp_path, "Bert", "BertForSequenceClassification")
    card = tmp_path / "README.md"
    card.write_text("---\npipeline_tag: zero-shot-classification\n---\n# A model\n")
    assert infer(model) == ("zero-shot-classification", "the pipeline_tag of its card")
    for useless in ("pipeline_tag: fill-mask", "pipeline_tag: [a, b]", "- a list", "{", "tags: [x]"):
        card.write_text(f"---\n{useless}\n---\n")
        assert infer(model)[0] == "text-classification", useless
    (tmp_path / "modules.json").write_text(json.dumps([]))
    assert infer(model)[0] == "embedding"


@pytest.mark.parametrize(
    ("files", "task"),
    [
        ({"modules.json": [{"type": "sentence_transformers.sparse_encoder.models.SpladePooling"}]}, "sparse-embedding"),
        ({"modules.json": [], "config_sentence_transformers.json": {"model_type": "SparseEncoder"}}, "sparse-embedding"),
        ({"modules.json": [], "config_sentence_transformers.json": {"model_type": "ColBERT"}}, "multi-vector-embedding"),
        ({"modules.json": [{"type": "pylate.models.Dense.Dense"}]}, "multi-vector-embedding"),
        ({"modules.json": [], "artifact.metadata": {}}, "embedding"),
        ({"artifact.metadata": {}}, "multi-vector-embedding"),
        ({"modules.json": [{"type": "sentence_transformers.models.Pooling"}]}, "embedding"),
    ],
)  # fmt: skip
def test_the_files_of_an_encoder_name_its_task(tmp_path: Path, files: dict[str, Any], task: str) -> None:
    model = model_of(tmp_path, "Bert", "BertForMaskedLM")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    kind = "sentence-transformers" if "modules.json" in files else "ColBERT"
    assert infer(model) == (task, f"its {kind} files")


def test_a_config_for_one_task_names_it(tmp_path: Path) -> None:
    for specific, task in (
        (["summarization"], "summarization"),
        (["translation_en_to_de"], "translation_en_to_de"),
        (["summarization", "translation_en_to_de"], "text2text-generation"),
    ):
        settings = {name: {"prefix": "x: "} for name in specific}
        model = model_of(tmp_path, "T5", "T5ForConditionalGeneration", task_specific_params=settings)
        assert infer(model)[0] == task


@pytest.mark.parametrize(
    ("name", "task", "params"),
    [
        ("conversational", "text-generation", {}),
        ("sentence-similarity", "embedding", {}),
        ("translation", "translation", {}),
        ("translation_en_to_de", "translation", {"src_lang": "en", "tgt_lang": "de"}),
        ("translation_eng_Latn_to_deu_Latn", "translation", {"src_lang": "eng_Latn", "tgt_lang": "deu_Latn"}),
    ],
)
def test_other_names_of_tasks(name: str, task: str, params: dict[str, str]) -> None:
    cls, meant = named(name)
    assert (cls.name, meant) == (task, params)
    cls.Params.model_validate(meant)


def test_an_unknown_name_is_reported_with_those_that_exist() -> None:
    with pytest.raises(SpecError, match=r"unknown task 'translation_en'; choose one of: .*translation"):
        named("translation_en")

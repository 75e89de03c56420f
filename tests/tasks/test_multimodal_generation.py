"""Texts about images are those of one row alone: of the pipeline, or of the model class's documented use."""

from __future__ import annotations

from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, pipeline

from hfbatch.data.media_files import RowFiles
from hfbatch.runtime.batching import to_arrow
from hfbatch.tasks import task_class
from hfbatch.tasks.base import Task
from hfbatch.tasks.generation.sampling import row_seeds
from hfbatch.tasks.multimodal.media_prompts import filled, is_typed_chat
from hfbatch.tasks.pipelines.serialization import load as unpack
from tests.models.multimodal import tiny_blip, tiny_git, tiny_llava, tiny_trocr
from tests.models.text import tiny_bert
from tests.tasks.drive import features_of, load, make, measured, run
from tests.tasks.test_pipeline_tasks import image_files

CAPTION, PROMPT = task_class("image-to-text"), task_class("image-text-to-text")
FILES = image_files(12)
ASKED = ["the river", "a table of numbers", "what the model said, word for word"]
TEXTS = [ASKED[k % 3] for k in range(12)]
SHORT = {"max_new_tokens": 8}
CAPTIONERS = {
    "blip": lambda folder: tiny_blip(folder, "ConditionalGeneration"),
    "git": tiny_git,
    "trocr": tiny_trocr,
}


def shown(file: bytes) -> Image.Image:
    return Image.open(BytesIO(file)).convert("RGB")


def texts_of(task: Task, columns: dict[str, Any], size: int | None = None, **options: Any) -> list[str]:
    return run(task, columns, size, **options)["generated_text"].to_pylist()


@pytest.mark.parametrize(
    "options",
    [
        SHORT,
        {"num_beams": 3, "length_penalty": 0.5, **SHORT},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 4, **SHORT},
    ],
    ids=["greedy", "beams", "rules"],
)
@pytest.mark.parametrize("name", CAPTIONERS)
def test_captions(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    folder = CAPTIONERS[name](tmp_path)
    task = make(CAPTION, folder, **options)
    assert task.check() == []
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    pixels, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = []
    for file in FILES:
        made = model.generate(**pixels(images=shown(file), return_tensors="pt"), **options)
        expected.append(tokenizer.decode(made[0], skip_special_tokens=True))
    assert len(set(expected)) > 6
    assert texts_of(task, {"image": FILES}) == expected


@pytest.mark.parametrize("name", ["blip", "git", "llava"])
def test_prompts_about_images(tmp_path: Path, name: str) -> None:
    folder = tiny_llava(tmp_path) if name == "llava" else CAPTIONERS[name](tmp_path)
    texts = [f"<image>{text}" for text in TEXTS] if name == "llava" else TEXTS
    task = make(PROMPT, folder, **SHORT)
    assert task.check() == []
    oracle = pipeline("image-text-to-text", folder, device="cpu", **SHORT)
    expected = [
        oracle(shown(file), text=text, return_full_text=False)[0]["generated_text"]
        for file, text in zip(FILES, texts, strict=True)
    ]
    assert len(set(expected)) > 6
    assert texts_of(task, {"image": FILES, "text": texts}) == expected


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llava(tmp_path_factory.mktemp("llava"))


def typed(k: int, image: Any) -> list[dict[str, Any]]:
    """A chat of typed parts; every fourth one has the assistant's answer begun, every third has two images."""
    parts = [{"type": "image", "image": image}, {"type": "text", "text": TEXTS[k]}]
    chat = [{"role": "user", "content": parts + parts[:1] * (k % 3 == 2)}]
    begun = {"role": "assistant", "content": [{"type": "text", "text": "The blue"}]}
    return [*chat, begun] if k % 4 == 3 else chat


def test_chats_with_images_in_them(llava: str) -> None:
    task = make(PROMPT, llava, **SHORT)
    chats = [typed(k, file) for k, file in enumerate(FILES)]
    assert is_typed_chat(pa.array(chats).type)
    oracle = pipeline("image-text-to-text", llava, device="cpu", **SHORT)
    expected = [
        oracle(text=typed(k, shown(file)), return_full_text=False)[0]["generated_text"]
        for k, file in enumerate(FILES)
    ]
    assert len(set(expected)) > 6
    assert texts_of(task, {"messages": chats}) == expected
    bare = [typed(k, None) for k in range(12)]
    beside = [[file] * (1 + (k % 3 == 2)) for k, file in enumerate(FILES)]
    assert texts_of(task, {"messages": bare, "image": beside}) == expected


def test_images_beside_a_chat_of_strings_come_first(llava: str) -> None:
    task = make(PROMPT, llava, **SHORT)
    plain = [[{"role": "user", "content": text}] for text in TEXTS[:4]]
    parts = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        for text in TEXTS[:4]
    ]
    found = texts_of(task, {"messages": plain, "image": FILES[:4]})
    assert found == texts_of(task, {"messages": parts, "image": FILES[:4]})
    assert found != texts_of(task, {"messages": plain})


def test_bad_chats_are_errors() -> None:
    image, openers = {"type": "image"}, {"image": str}
    for chat, given, match in (
        ([], [], "empty"),
        ([{"role": "user", "content": None}], [], "no content"),
        ([{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}], [], "'video'"),
        ([{"role": "user", "content": [image]}], [], "more of image than the row has"),
        ([{"role": "user", "content": [image]}], ["a", "b"], "1 more than"),
        ([{"role": "system", "content": "x"}], ["a"], "no message has role user"),
    ):
        with pytest.raises(ValueError, match=match):
            filled(chat, {"image": given}, openers)


@pytest.mark.parametrize("kind", [CAPTION, PROMPT])
def test_a_row_samples_the_same_in_any_batch_and_by_its_place(tmp_path: Path, kind: type[Task]) -> None:
    folder = tiny_blip(tmp_path, "ConditionalGeneration")
    columns = {"image": FILES[:1] * 9, **({"text": TEXTS[:1] * 9} if kind is PROMPT else {})}
    chosen = {"do_sample": True, "temperature": 2.0, "top_k": 0, **SHORT}
    task = make(kind, folder, **chosen)
    assert task.check() == []
    found = texts_of(task, columns, 1)
    assert len(set(found)) > 6
    assert texts_of(task, columns, 8) == found
    assert texts_of(task, columns, 4, order=[8, 3, 0, 5, 1, 7, 2, 6, 4]) == found
    other = make(kind, folder, seed=1, **chosen)
    assert texts_of(other, columns) != found
    most_probable = make(kind, folder, do_sample=True, top_k=1, **SHORT)
    assert texts_of(most_probable, columns) == texts_of(make(kind, folder, **SHORT), columns)


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0, "top_k": 8, "top_p": 0.9}])
def test_sampling_draws_from_the_softmax_of_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    folder, rows = tiny_trocr(tmp_path), 4000
    task = make(CAPTION, folder, do_sample=True, max_new_tokens=1, **options)
    one = features_of(task, {"image": FILES[:1]}).table["inputs"][0]
    places = pa.table({"file": ["a.parquet"] * rows, "row": range(rows)})
    table = pa.table({"inputs": [one.as_py()] * rows, "seed": row_seeds(0, places)})
    model = load(task)
    drawn: Counter[str] = Counter()
    for start in range(0, rows, 1000):
        outputs = task.forward(model, task.collate(table, np.arange(start, start + 1000), 1))
        drawn.update(task.postprocess(to_arrow(outputs, {}), {})[0].to_pylist())
    pixels, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chosen = {"do_sample": True, "output_scores": True, "return_dict_in_generate": True, **options}
    inputs = pixels(images=shown(FILES[0]), return_tensors="pt")
    expected: Counter[str] = Counter()
    for token, share in enumerate(
        model.generate(**inputs, max_new_tokens=1, **chosen).scores[0][0].softmax(0)
    ):
        expected[tokenizer.decode([2, token], skip_special_tokens=True)] += float(share)
    assert sum(share > 0.01 for share in expected.values()) > 4
    assert sum(abs(drawn[text] / rows - expected[text]) for text in drawn | expected) / 2 < 0.05


def test_the_choice_of_a_batch_size_waits_for_a_few_tokens_alone(tmp_path: Path) -> None:
    task = make(CAPTION, tiny_git(tmp_path), max_new_tokens=30)
    batch, model = task.collate(features_of(task, {"image": FILES[:3]}).table, np.arange(3), 1), load(task)
    whole, brief = (
        unpack(call(model, batch)["outputs"][0])[0]["tokens"] for call in (task.forward, task.trial_forward)
    )
    assert whole.shape[1] > 20
    assert whole[:, : brief.shape[1]].tolist() == brief.tolist()
    assert brief.shape[1] == 1 + 8


def test_models_and_params_that_do_not_fit_are_refused(tmp_path: Path, llava: str) -> None:
    trocr = tiny_trocr(tmp_path / "a")
    assert "image-to-text" in make(PROMPT, trocr).check()[0]
    assert "image-text-to-text" in make(CAPTION, llava).check()[0]
    assert "BertForSequenceClassification" in make(PROMPT, tiny_bert(tmp_path / "b")).check()[0]
    several = make(CAPTION, trocr, temperature=0.5).check()
    assert "temperature" in several[0]
    assert "batch.max_length" in make(CAPTION, trocr, 8).check()[0]
    assert "3 beams cannot sample" in make(CAPTION, trocr, do_sample=True, num_beams=3).check()[0]


def test_columns_that_do_not_fit_are_refused(tmp_path: Path, llava: str) -> None:
    task = make(PROMPT, llava)
    assert task.column_faults({"image", "text"}) == []
    assert task.column_faults({"messages"}) == []
    assert "neither" in task.column_faults({"image"})[0]
    assert "both" in task.column_faults({"text", "messages"})[0]
    assert "no image" in task.column_faults({"text"})[0]
    mute = make(PROMPT, tiny_llava(tmp_path, chat=False))
    assert "no chat template" in mute.column_faults({"messages"})[0]


@pytest.mark.parametrize("kind", [CAPTION, PROMPT])
def test_the_example_runs(tmp_path: Path, llava: str, kind: type[Task]) -> None:
    folder = llava if kind is PROMPT else tiny_git(tmp_path / "model")
    task = make(kind, folder, files=RowFiles(str(tmp_path)), **kind.EXAMPLE.params)
    for name in kind.EXAMPLE.rows["image"]:
        (tmp_path / name).write_bytes(FILES[0])
    found = texts_of(task, kind.EXAMPLE.rows)
    assert measured(task, kind.EXAMPLE.rows).tolist() == [len(text) for text in found]
    assert features_of(task, kind.EXAMPLE.rows).truncated == 0

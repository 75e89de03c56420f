"""Names of classes that do not go with the classes of a model are told before work."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hfbatch.errors import SpecError
from hfbatch.hub.models import pin
from hfbatch.runtime.checks import check_task
from hfbatch.spec.job import JobSpec
from tests.models.text import tiny_bert

NAMES = {0: "calm", 1: "angry", 2: "undecided"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(tiny_bert(tmp_path, id2label=NAMES))


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def faults_and_notes(folder: Path, task: str = "text-classification") -> tuple[list[str], list[str]]:
    spec = JobSpec.build({"task": task, "model": str(folder), "input": "in", "output": "out"})
    faults: list[str] = []
    notes: list[str] = []
    check_task(spec, pin(spec.model), "", faults, notes)
    return faults, notes


def test_names_that_go_with_the_weights_pass(folder: Path) -> None:
    assert faults_and_notes(folder) == ([], [])


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"id2label": {"0": "a", "2": "b", "3": "c"}}, ("no name for class 1", "0, 2, 3")),
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, ("no name for class 0",)),
        ({"id2label": {"0": "a", "1": "b"}}, ("weights have 3 classes", "names 2")),
        ({"id2label": {str(number): str(number) for number in range(5)}}, ("weights have 3 classes", "names 5")),
        ({"num_labels": 4}, ("num_labels 4", "3 names")),
    ],
)  # fmt: skip
def test_a_hole_and_a_wrong_number_are_reported(
    folder: Path, values: dict[str, Any], parts: tuple[str, ...]
) -> None:
    change(folder, **values)
    (fault,), _ = faults_and_notes(folder)
    assert all(part in fault for part in (str(folder), *parts)), fault
    assert faults_and_notes(folder, "embedding")[0] == []  # which names no classes


def test_a_name_of_two_classes_is_noted(folder: Path) -> None:
    """As some models of ImageNet have it: `crane`, the bird and the machine."""
    change(folder, id2label={"0": "crane", "1": "b", "2": "crane"})
    faults, (note,) = faults_and_notes(folder)
    assert faults == []
    assert "'crane'" in note


def test_names_are_looked_for_in_every_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save_file({"bert.x": np.ones((2, 2), np.float32)}, folder / shards[0])
    save_file({"classifier.weight": np.ones((2, 32), np.float32)}, folder / shards[1])
    weight_map = {"bert.x": shards[0], "classifier.weight": shards[1]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (fault,), _ = faults_and_notes(folder)
    assert "weights have 2 classes" in fault


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", {"version": "1.0"}), ("config.json", {"model_type": "bert", "hidden_size": "many"}),
     ("config.json", {"model_type": "bert", "id2label": {"a": "b"}}), ("config.json", {"model_type": "no-such"})],
)  # fmt: skip
def test_whatever_a_library_raises_over_a_file_is_a_sentence(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(SpecError, match=r"cannot be used: ") as caught:
        faults_and_notes(folder)
    assert str(folder) in caught.value.faults[0]


@pytest.mark.parametrize("config", [None, {"tokenizer_class": "BertTokenizer"}])
@pytest.mark.parametrize("task", ["text-classification", "zero-shot-classification"])
def test_a_tokenizer_without_its_vocabulary_is_reported(folder: Path, config: Any, task: str) -> None:
    """Transformers makes one that takes every word for an unknown one."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        SpecError, match=r"no vocabulary for BertTokenizer \(tokenizer\.json or vocab\.txt is missing"
    ):
        faults_and_notes(folder, task)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "river"]
    (folder / "vocab.txt").write_text("\n".join(words))
    assert faults_and_notes(folder)[0] == []


@pytest.mark.parametrize(
    ("file", "outcome"),
    [
        (
            "config.json",
            pytest.raises(SpecError, match=r"Python code of its own; .* model\.trust_remote_code=true"),
        ),
        ("tokenizer_config.json", nullcontext()),  # transformers has one for this kind of model
    ],
)
def test_python_code_beside_a_model_is_not_run_unasked(
    folder: Path, tmp_path: Path, file: str, outcome: Any
) -> None:
    """Nor is a pickle opened, though there are some in the folder."""
    mark = tmp_path / "ran"
    for name in ("evil.py", "custom_generate/generate.py"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"open({str(mark)!r}, 'w')\nclass Config: pass\nclass Tokenizer: pass\n")
    pickle = f"cbuiltins\nopen\n(V{mark}\nVw\ntR.".encode()
    for name in ("pytorch_model.bin", "training_args.bin", "scheduler.pt"):
        (folder / name).write_bytes(pickle)
    own = {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", None]}
    path = folder / file
    values = json.loads(path.read_text())
    path.write_text(
        json.dumps({**values, "auto_map": own, "tokenizer_class": "Unknown", "model_type": "mine"})
    )
    with outcome:
        faults_and_notes(folder)
    assert not mark.exists()

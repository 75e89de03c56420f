"""Every task that can be trained, in full and with adapters: the loss falls, and the model answers with what it has learnt."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.recipes import RECIPES
from tests.cases.every import CASES
from tests.models.text import CORPUS
from tests.tasks.audio_files import chirp, file_of, tone
from tests.train.tools import predicted, run_here, worker_config_of


def grey(level: int, number: int) -> bytes:
    """An image of one grey with some noise, as PNG."""
    noise = np.random.default_rng(number).integers(-20, 20, (40, 40, 3))
    file = BytesIO()
    Image.fromarray((level + noise).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


NOT = ["with" if "not" in text else "without" for text in CORPUS[:16]]
RECORDINGS = [file_of((chirp if k % 2 else tone)(0.2 + 0.01 * k, 200 + 20 * k)) for k in range(16)]
WRITTEN = {"text": CORPUS[:16], "target": [text.split()[0] for text in CORPUS[:16]]}
ROWS: dict[str, Mapping[str, list[Any]]] = {
    "text-classification": {"text": CORPUS[:16], "label": NOT},
    "token-classification": {
        "tokens": [text.split() for text in CORPUS[:16]],
        "tags": [["B-NOT" if word == "not" else "O" for word in text.split()] for text in CORPUS[:16]],
    },
    "question-answering": {
        "question": ["what comes first?"] * 16,
        "context": CORPUS[:16],
        "answers": [{"text": [text.split()[0]], "answer_start": [0]} for text in CORPUS[:16]],
    },
    "fill-mask": {"text": CORPUS[:16]},
    "text-generation": {"prompt": CORPUS[:16], "completion": [f" {text.split()[0]}" for text in CORPUS[:16]]},
    "summarization": WRITTEN,
    "translation": WRITTEN,
    "text2text-generation": WRITTEN,
    "image-classification": {
        "image": [grey(60 + 120 * (k % 2), k) for k in range(16)],
        "label": ["light" if k % 2 else "dark" for k in range(16)],
    },
    "audio-classification": {"audio": RECORDINGS, "label": ["chirp" if k % 2 else "tone" for k in range(16)]},
    "embedding": {"anchor": CORPUS[:16], "positive": [text.upper() for text in CORPUS[:16]]},
}
PARAMS = {
    name: {"predict_with_generate": False}
    for name in ("summarization", "translation", "text2text-generation")
}
ASKED: dict[str, Mapping[str, list[Any]]] = {
    "token-classification": {"words": ROWS["token-classification"]["tokens"]},
    "fill-mask": {"text": [text.replace(text.split()[0], "[MASK]", 1) for text in CORPUS[:16]]},
    "text-generation": {"text": CORPUS[:16]},
    "embedding": {"text": CORPUS[:16]},
}
"""What is asked of the trained model, where it is not what it learnt from."""
WRITES = {"summarization", "translation", "text2text-generation", "text-generation"}


def test_every_recipe_is_here() -> None:
    assert set(ROWS) == set(RECIPES)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", ROWS)
def test_the_loss_falls_and_the_model_answers(name: str, method: str, tmp_path: Path) -> None:
    model = CASES[name].build(tmp_path / "base")
    pq.write_table(pa.table(dict(ROWS[name])), tmp_path / "rows.parquet")
    spec = FinetuneSpec.build(
        {
            "task": name, "model": model, "train": str(tmp_path / "rows.parquet"), "eval": str(tmp_path / "rows.parquet"),
            "output": str(tmp_path / "out"), "method": {"name": method, "dropout": 0}, "params": PARAMS.get(name, {}),
            "schedule": {"steps": 6, "learning_rate": 1e-2 if method == "lora" else 3e-3, "warmup": 0},
            "evaluation": {"every": 6}, "batch": {"size": 16}, "compute": {"dtype": "float32"}, "report_to": [],
        }
    )  # fmt: skip
    order = worker_config_of(spec)
    news, _ = run_here(order, tmp_path)
    losses = [entry["eval_loss"] for entry in news["log"] if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    measured = {
        name.removeprefix("eval_") for entry in news["log"] for name in entry if name.startswith("eval_")
    }
    assert measured <= {"loss", *order.recipe.metrics}
    assert 0 < news["trainable"] <= news["weights"]
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists() == (method == "lora")
    asked = ASKED.get(name, {column: values for column, values in ROWS[name].items() if column != "label"})
    pq.write_table(pa.table(dict(asked)), tmp_path / "asked.parquet")
    params = {"max_new_tokens": 4} if name in WRITES else {}
    answers = predicted(
        name, str(tmp_path / "out" / "model"), tmp_path / "asked.parquet", tmp_path / "answers", **params
    )
    assert len(answers) == 16
    assert labels_of(answers) <= set(order.fitted.get("labels", []))


def labels_of(answers: pa.Table) -> set[str]:
    """The labels that answers hold; none for tasks that give others."""
    if "entities" in answers.column_names:
        return {one["entity"] for row in answers["entities"].to_pylist() for one in row}
    found = answers["label"].to_pylist() if "label" in answers.column_names else []
    return {label for one in found for label in (one if isinstance(one, list) else [one])}

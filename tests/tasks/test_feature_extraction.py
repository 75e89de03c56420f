"""Several layers and attentions are those of the model, called on each text alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from hfbatch.tasks import task_class
from tests.models.text import CORPUS, tiny_bert_encoder
from tests.tasks.drive import make, run

TEXTS = [*CORPUS[:6], "", "river " * 70, *(" ".join(CORPUS[k : k + 3]) for k in range(4))]


def test_layers_and_attentions(tmp_path: Path) -> None:
    folder = tiny_bert_encoder(tmp_path)
    task = make(task_class("feature-extraction"), folder, layer=[-1, 0], attentions=True)
    assert task.check() == []
    assert "MB" in task.notes()[0]
    found = run(task, {"text": TEXTS}, multiple=8)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    for row, text in zip(found.to_pylist(), TEXTS, strict=True):
        with torch.inference_mode():
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=64)
            expected = model(**inputs, output_hidden_states=True, output_attentions=True)
        layers = torch.stack([expected.hidden_states[-1][0], expected.hidden_states[0][0]], dim=1)
        np.testing.assert_allclose(row["features"], layers, atol=1e-4)
        np.testing.assert_allclose(row["attentions"], torch.cat(expected.attentions), atol=1e-4)


def test_layers_that_are_not_there_are_faults(tmp_path: Path) -> None:
    task = make(task_class("feature-extraction"), tiny_bert_encoder(tmp_path), layer=[0, 3, -4])
    assert [fault.partition(" does not")[0] for fault in task.check()] == [
        "params.layer 3",
        "params.layer -4",
    ]

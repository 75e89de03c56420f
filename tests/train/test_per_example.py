"""Single rows beside the metrics: which are the worst, which label is taken for which."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from hfbatch.train.data.rows import ROW
from hfbatch.train.features import as_text, is_readable
from hfbatch.train.loop.per_example import MOST_WORST, summary
from hfbatch.train.metrics.per_example import label_details, labels_details, number_details
from tests.cases.every import CASES
from tests.models.text import CORPUS
from tests.train.drive import Bench
from tests.train.test_every_recipe import ROWS

TEXTS = ["a lovely film", "never again", "so so", "I would see it twice", "what a bore it was", "fine"]


def test_losses_are_those_of_torch() -> None:
    logits, labels = (
        np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32),
        np.array([0, 1, 2, 1, 1]),
    )
    found = label_details(logits, labels, ["a", "b", "c"])
    given = torch.from_numpy(logits), torch.from_numpy(labels)
    expected = torch.nn.functional.cross_entropy(*given, reduction="none")
    np.testing.assert_allclose(found["losses"], expected, rtol=1e-5)
    assert np.sum(found["confusion"]["counts"], axis=1).tolist() == [1, 3, 1]
    hot = (logits > 0.3).astype(np.float32)
    several = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits), torch.from_numpy(hot), reduction="none"
    )
    np.testing.assert_allclose(
        labels_details(logits, hot, ["a", "b", "c"])["losses"], several.mean(1), rtol=1e-5
    )
    assert number_details(np.array([1.0, 2.0]), np.array([3.0, 2.0]))["losses"] == [4.0, 0.0]


def test_the_worst_rows_come_first_and_a_row_of_several_features_once(encoder: str) -> None:
    bench = Bench("text-classification", encoder, {"text": TEXTS, "label": ["x", "y", "x", "y", "x", "y"]})
    bench.ready()
    logits = [np.array([1.0, -1.0]), np.array([9.0, -9.0]), np.array([-2.0, 2.0])] * 2
    rows = bench.features.append_column(ROW, pa.array([0, 1, 2, 2, 3, 4]))
    found = summary(bench.recipe, logits, rows)
    # x, y, x, y, x, y against x, x, y, x, x, y: row 1 is far off, row 2 has two features of which the worse counts
    assert [one["row"] for one in found["worst"]] == [1, 2, 0, 4, 3]
    assert found["worst"][0]["loss"] == pytest.approx(18, abs=1e-3)
    assert (found["worst"][0]["truth"], found["worst"][0]["guess"]) == ("y", "x")
    assert found["confusion"] == {"labels": ["x", "y"], "counts": [[2, 1], [2, 1]]}


@pytest.mark.parametrize("name", ["question-answering", "text-generation", "summarization", "fill-mask"])
def test_the_loss_of_a_row_is_that_of_a_batch_of_it_alone(name: str, tmp_path: Path) -> None:
    options = {"params": {"max_new_tokens": 4}} if name == "summarization" else {}
    bench = Bench(name, CASES[name].build(tmp_path / "model"), ROWS[name], **options).ready()
    found = bench.recipe.details(bench.predictions(), bench.features)
    assert len(found["losses"]) == len(bench.features)
    with torch.no_grad():
        alone = [float(bench.loss(bench.batch(number))) for number in range(len(bench.features))]
    np.testing.assert_allclose(found["losses"], alone, rtol=1e-3, atol=1e-5)
    if name == "question-answering":
        assert found["truths"] == [text.split()[0] for text in CORPUS[:16]]
        assert all(guess in text for guess, text in zip(found["guesses"], CORPUS, strict=False))
    if name == "summarization":
        assert found["truths"] == ROWS[name]["target"]
        assert len(found["guesses"]) == 16


def test_words_with_wrong_tags_are_named(encoder: str) -> None:
    rows = ROWS["token-classification"]
    bench = Bench("token-classification", encoder, rows).ready()
    found = bench.recipe.details(bench.predictions(), bench.features)
    with torch.no_grad():
        alone = [float(bench.loss(bench.batch(number))) for number in range(len(bench.features))]
    np.testing.assert_allclose(found["losses"], alone, rtol=1e-3)
    wrong = 0
    for tags, truth, guess in zip(rows["tags"], found["truths"], found["guesses"], strict=True):
        right, guessed = (
            dict(
                part.removeprefix("word ").split(": ")
                for part in reported.split(", ")
                if reported != "no word"
            )
            for reported in (truth, guess)
        )
        assert right == {number: tags[int(number)] for number in right}
        assert all(right[number] != guessed[number] for number in right)
        wrong += len(right)
    words = sum(map(len, rows["tags"]))
    assert 0 < wrong == round((1 - bench.metrics()["accuracy"]) * words)


def test_few_rows_are_kept_of_many() -> None:
    class Recipe:
        def details(self, predictions: list[float], features: pa.Table) -> dict[str, list[float]]:
            return {"losses": predictions}

    rows = pa.table({ROW: range(100)})
    found = summary(Recipe(), [float(number) for number in range(100)], rows)  # type: ignore[arg-type]
    assert [one["row"] for one in found["worst"]] == list(range(99, 99 - MOST_WORST, -1))
    assert found["worst"][0] == {"row": 99, "loss": 99.0, "guess": None, "truth": None}


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_every_kind_of_label_says_which_metrics_it_has(encoder: str, kind: str) -> None:
    labels = {"single": ["x", "y"] * 3, "multi": [["x"], ["y"], []] * 2, "regression": [0.5, 1.5, 2.5] * 2}
    bench = Bench("text-classification", encoder, {"text": TEXTS, "label": labels[kind]}).ready()
    assert set(bench.metrics()) <= set(bench.recipe.metrics)
    assert bench.recipe.metric_faults(bench.recipe.metric) == bench.recipe.metric_faults("loss") == []
    (fault,) = bench.recipe.metric_faults("bleu")
    assert fault.startswith("evaluation.metric 'bleu' is none of: ")


def test_images_and_audio_are_not_shown_and_long_texts_are_cut() -> None:
    shown = [pa.string(), pa.int64(), pa.list_(pa.string()), pa.struct([("role", pa.string())])]
    hidden = [pa.binary(), pa.struct([("bytes", pa.binary())]), pa.list_(pa.float32())]
    assert [is_readable(kind) for kind in shown] == [True] * 4
    assert [is_readable(kind) for kind in hidden] == [False] * 3
    assert len(as_text("x" * 10_000)) == 400
    assert as_text(["a", "ä"]) == '["a", "ä"]'

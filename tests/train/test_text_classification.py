"""Training text-classification: losses are those of transformers, faults are told before work."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from hfbatch.errors import SpecError
from hfbatch.train.recipes.labels import is_label
from tests.train.drive import Bench

TEXTS = ["a lovely film", "never again", "so so", "I would see it twice", "what a bore it was", "fine"]
KINDS = {
    "single": ["good", "bad", "fair", "good", "bad", "fair"],
    "multi": [["good", "long"], ["bad"], [], ["good"], ["bad", "long"], ["long"]],
    "regression": [0.9, 0.1, 0.5, 0.8, 0.0, 0.6],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_transformers(encoder, kind):
    bench = Bench("text-classification", encoder, {"text": TEXTS, "label": KINDS[kind]}).ready()
    batch = bench.batch()
    torch.testing.assert_close(bench.loss(batch), bench.model(**batch).loss)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_same_loss_however_it_is_cut(encoder, kind):
    bench = Bench("text-classification", encoder, {"text": TEXTS, "label": KINDS[kind]}).ready()
    whole = bench.batch()
    items = int(whole["labels"].ne(-100).sum())
    parts = [bench.loss(bench.batch(*numbers), items) for numbers in ([0], [1, 2, 3], [4, 5])]
    torch.testing.assert_close(sum(parts), bench.loss(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_rows_improves_the_metrics(encoder, kind):
    bench = Bench("text-classification", encoder, {"text": TEXTS, "label": KINDS[kind]}).ready()
    first, last = bench.learn()
    assert last < first / 2
    assert bench.metrics()[bench.recipe.metric] > 0.9


def test_balanced_weights_make_every_label_count_the_same(encoder):
    labels = ["rare", *["common"] * 5]
    bench = Bench(
        "text-classification", encoder, {"text": TEXTS, "label": labels}, params={"class_weights": "balanced"}
    )
    bench.fit()
    assert dict(zip(bench.recipe.labels, bench.recipe.weights, strict=True)) == {"common": 0.6, "rare": 3.0}


@pytest.mark.parametrize(("kind", "fault"), [("single", "label is null"), ("multi", "label holds a null")])
def test_labels_that_are_numbers_may_have_names(encoder, kind, fault):
    names, numbers = ["good", "bad", "fair", "never"], [1, 0, 2, 0, 1, 2]
    labels = numbers if kind == "single" else [[number] for number in numbers]
    options = {"params": {"label_names": names}}
    recipe = Bench("text-classification", encoder, {"text": TEXTS, "label": labels}, **options).ready().recipe
    assert recipe.labels == ["good", "bad", "fair"]
    reported = {label: recipe.fitted["counts"][label] for label in recipe.labels}
    assert reported == {"good": 2, "bad": 2, "fair": 2}
    beyond = [*numbers[:5], 4] if kind == "single" else [*labels[:5], [0, -1]]
    bench = Bench("text-classification", encoder, {"text": TEXTS, "label": beyond}, **options)
    assert bench.validate().faults == [
        f"rows.parquet row 5: {fault} or a number beyond the 4 of params.label_names"
    ]


def test_a_vector_of_0_and_1_is_no_list_of_labels(encoder):
    labels = [[0, 1], [1, 0], [1, 1], [0, 0], [0], [1]]
    found = Bench("text-classification", encoder, {"text": TEXTS, "label": labels}).validate()
    twice = "label holds one twice; give the labels of the row, not a vector of 0 and 1"
    assert found.faults == [f"rows.parquet row {row}: {twice}" for row in (2, 3)]
    assert not is_label(pa.list_(pa.float32()))
    assert not is_label(pa.list_(pa.bool_()))
    assert is_label(pa.large_list(pa.large_string()))


def test_targets_of_regression_are_any_numbers(encoder):
    labels = [-100.0, 16777217.0, 1.5, -99.5, 0.0, 2.0]
    bench = Bench("text-classification", encoder, {"text": TEXTS, "label": labels}).ready()
    assert (bench.batch()["labels"] != -100).all()
    assert bench.batch()["labels"].tolist() == pytest.approx(labels, rel=1e-6)
    whole = Bench(
        "text-classification",
        encoder,
        {"text": TEXTS, "label": [16777217, 1, 2, 3, 4, 5]},
        params={"kind": "regression"},
    )
    assert whole.ready().batch()["labels"].tolist() == pytest.approx([16777217, 1, 2, 3, 4, 5], rel=1e-6)


def test_whole_numbers_that_are_kept_as_floats_may_be_labels(encoder):
    rows = {"text": TEXTS, "label": [1.0, 0.0, 1.0, 0.0, 2.0, 1.0]}
    assert Bench("text-classification", encoder, rows, params={"kind": "single"}).ready().recipe.labels == [
        "0",
        "1",
        "2",
    ]


@pytest.mark.parametrize("kind", ["multi", "regression"])
def test_label_smoothing_is_for_one_label_a_row(encoder, kind):
    rows, schedule = {"text": TEXTS, "label": KINDS[kind]}, {"label_smoothing": 0.1}
    (fault,) = Bench("text-classification", encoder, rows, schedule=schedule).fit()
    assert fault.startswith("schedule.label_smoothing is for rows of one label")


@pytest.mark.parametrize(
    ("param", "reported"),
    [
        ({"label_names": ["a", "b"]}, "is for whole numbers"),
        ({"class_weights": "balanced"}, "has no classes"),
    ],
)
def test_what_is_for_classes_is_refused_for_quantities(encoder, param, reported):
    rows = {"text": TEXTS, "label": KINDS["regression"]}
    (fault,) = Bench("text-classification", encoder, rows, params=param).fit()
    assert reported in fault


def test_a_column_of_nulls_is_reported_by_its_rows(encoder):
    rows = {"text": pa.nulls(2), "label": ["a", "b"]}
    assert Bench("text-classification", encoder, rows).validate().faults == [
        f"rows.parquet row {row}: text is null or empty" for row in (0, 1)
    ]


def test_faults_of_rows_name_file_and_row(encoder):
    found = Bench(
        "text-classification", encoder, {"text": ["a", None, ""], "label": ["x", "y", None]}
    ).validate()
    assert found.faults == [
        "rows.parquet row 2: label is null",
        "rows.parquet row 1: text is null or empty",
        "rows.parquet row 2: text is null or empty",
    ]


def test_a_label_that_is_empty_and_half_a_pair_are_faults(encoder):
    rows = {
        "text": TEXTS,
        "text_pair": ["a", None, *"cdef"],
        "label": ["good", "bad", "", "good", "bad", "bad"],
    }
    faults = Bench("text-classification", encoder, rows).validate().faults
    assert faults == ["rows.parquet row 2: label is empty", "rows.parquet row 1: text_pair is null"]


def test_one_label_alone_is_refused(encoder):
    (fault,) = Bench("text-classification", encoder, {"text": ["a", "b"], "label": ["x", "x"]}).fit()
    assert "same label 'x'" in fault


def test_whole_numbers_are_labels_in_their_order(encoder):
    bench = Bench("text-classification", encoder, {"text": TEXTS, "label": [10, 2, 10, 2, 1, 1]}).ready()
    assert bench.recipe.labels == ["1", "2", "10"]
    assert bench.batch()["labels"].tolist() == [2, 1, 2, 1, 0, 0]
    assert bench.model.config.id2label == {0: "1", 1: "2", 2: "10"}
    assert np.isfinite(bench.metrics()["roc_auc"])


def test_a_null_among_the_labels_of_a_row_is_a_fault(encoder):
    labels = [["good"], ["bad", None], [], None, ["bad"], ["good"]]
    assert Bench("text-classification", encoder, {"text": TEXTS, "label": labels}).validate().faults == [
        "rows.parquet row 3: label is null",
        "rows.parquet row 1: label holds a null",
    ]


@pytest.mark.parametrize(
    ("kind", "asked"), [("single", "multi"), ("multi", "single"), ("single", "regression")]
)
def test_a_kind_that_the_labels_are_not_of_is_refused(encoder, kind, asked):
    bench = Bench(
        "text-classification", encoder, {"text": TEXTS, "label": KINDS[kind]}, params={"kind": asked}
    )
    with pytest.raises(SpecError, match=f"params.kind is {asked}, but the labels are of type"):
        bench.validate()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e39])
@pytest.mark.parametrize("kind", ["auto", "single"])
def test_a_number_that_is_not_finite_is_reported_by_its_row(encoder: str, value: float, kind: str) -> None:
    rows = {"text": ["a", "b", "c"], "label": pa.array([0.5, value, 1.5])}
    (fault,) = Bench("text-classification", encoder, rows, params={"kind": kind}).validate().faults
    assert fault.startswith("rows.parquet row 1: label is ")
    half = {**rows, "label": pa.array([np.float16(0.5), np.float16("inf"), np.float16(1)], pa.float16())}
    (fault,) = Bench("text-classification", encoder, half, params={"kind": kind}).validate().faults
    assert "infinite" in fault

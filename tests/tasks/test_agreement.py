"""The measures of agreement between a lowered precision and float32, on columns of few rows."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hfbatch.tasks import TASKS, task_class
from hfbatch.tasks.agreement import Limit, Pixels, Ranking, Texts, Vectors
from hfbatch.tasks.answer_agreement import Best, Items, Labels
from hfbatch.tasks.similarity import spread
from hfbatch.tasks.vision.masks import box_overlap, decode_mask, encode_mask, mask_overlap


def columns(**values: list[Any]) -> dict[str, pa.Array]:
    return {name: pa.array(column) for name, column in values.items()}


def test_vectors_of_tokens_count_as_one_and_a_null_vector_equals_itself() -> None:
    one = columns(v=[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0]]])
    found = Vectors("v").compare(one, columns(v=[[[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0]]]))
    assert found.measures == {
        "cosine_mean": pytest.approx(0.75), "cosine_min": pytest.approx(0.5),
        "spread_change": pytest.approx(2**0.5 / 3 / (4 / 9) ** 0.5),
    }  # fmt: skip
    assert Vectors("v").compare(one, columns(v=[[[1.0]], [[1.0, 1.0]]])).rows.tolist() == [0, 0]


def test_vectors_that_differ_little_are_compared_by_what_differs() -> None:
    random = np.random.default_rng(0)
    one, other = 30 + random.normal(size=(2, 20, 8))
    found = Vectors("v").compare(columns(v=one.tolist()), columns(v=other.tolist())).measures
    assert found["cosine_min"] > 0.99
    assert not Vectors.limits["spread_change"].holds(found["spread_change"])
    near = one + 0.02 * random.normal(size=one.shape)
    found = Vectors("v").compare(columns(v=one.tolist()), columns(v=near.tolist())).measures
    assert found["spread_change"] < 0.05


def test_neighbours_are_compared_if_there_are_enough_rows() -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 8))
    same = Vectors("v").compare(columns(v=vectors.tolist()), columns(v=(2 * vectors).tolist()))
    assert same.measures["top10_overlap"] == 1
    other = Vectors("v").compare(columns(v=vectors.tolist()), columns(v=vectors[::-1].tolist()))
    assert other.measures["top10_overlap"] < 0.4


def test_the_best_answer_is_compared() -> None:
    one = columns(label=[["a", "b"], ["a", "b"], []], score=[[0.9, 0.1], [0.6, 0.4], []])
    other = columns(label=[["a", "b"], ["b", "a"], []], score=[[0.8, 0.2], [0.7, 0.3], []])
    found = Best("label").compare(one, other)
    assert found.rows == pytest.approx([0.9, 0, 1])
    assert found.measures == {
        "agreement": 0.5, "score_change_mean": pytest.approx(0.1), "score_change_max": pytest.approx(0.1),
        "all_scores_change_mean": pytest.approx(0.2),
    }  # fmt: skip
    structs = columns(answers=[[{"answer": "x", "start": 3, "score": 0.5}]])
    moved = columns(answers=[[{"answer": "x", "start": 4, "score": 0.5}]])
    assert Best("answers").compare(structs, structs).measures["agreement"] == 1
    assert Best("answers").compare(structs, moved).measures["agreement"] == 0


def test_all_scores_of_a_row_are_compared_in_any_order() -> None:
    one = columns(label=[["a", "b", "c"]], score=[[0.5, 0.3, 0.2]])
    for labels, scores, change in (
        (["a", "b", "c"], [0.5, 0.3, 0.2], 0),
        (["a", "c", "b"], [0.5, 0.28, 0.22], 0.08),
        (["a", "d", "c"], [0.5, 0.35, 0.15], 0.15),  # b has at most 0.15, and d at most 0.2 in float32
    ):
        found = Labels("label").compare(one, columns(label=[labels], score=[scores])).measures
        assert (found["agreement"], found["score_change_max"]) == (1, 0)
        assert found["all_scores_change_mean"] == pytest.approx(change)
    fills = [[{"token": 1, "score": 0.9}], [{"token": 2, "score": 0.9}]]
    other = [fills[0], [{"token": 3, "score": 0.9}]]  # of the second mask
    assert Best("fills").compare(columns(fills=[fills]), columns(fills=[other])).measures["agreement"] == 0


def test_the_labels_above_the_limit_are_compared_where_a_row_can_have_several() -> None:
    one = columns(label=[["a", "b", "c"]], score=[[0.9, 0.52, 0.1]])
    other = columns(label=[["a", "b", "c"]], score=[[0.9, 0.48, 0.1]])
    found = Labels("label", function="sigmoid").compare(one, other).measures
    assert (found["agreement"], found["labels_f1"]) == (1, pytest.approx(2 / 3))
    assert "labels_f1" not in Labels("label").compare(one, other).measures


@pytest.mark.parametrize("function", ["none", "sigmoid"])
def test_numbers_of_a_small_range_are_compared_by_their_spread(function: str) -> None:
    random = np.random.default_rng(0)
    values, labels = random.uniform(0.01, 0.04, 30), ["LABEL_0"] * 30
    agreement = Labels("label", function=function)
    for others, passes in (
        (random.permutation(values), False),
        (values * 1.005, True),
        (values * 0 + 0.02, False),
    ):
        found = agreement.compare(
            columns(label=labels, score=values), columns(label=labels, score=others)
        ).measures
        assert found["score_change_max"] < 0.05
        assert agreement.limits["spread_change"].holds(found["spread_change"]) == passes
    ranks = Ranking("scores"), columns(scores=values[:, None].tolist())
    found = ranks[0].compare(ranks[1], columns(scores=random.permutation(values)[:, None].tolist())).measures
    assert [name for name, limit in ranks[0].limits.items() if not limit.holds(found[name])] == [
        "spread_change"
    ]


def test_the_number_that_changes_most_counts() -> None:
    """A regression of two numbers, of which one is large and the other is not read at all."""
    random = np.random.default_rng(0)
    values, labels = random.normal(size=(30, 2)) * [1000, 0.01], [["size", "rate"]] * 30
    other = values * [1, 0]
    agreement = Labels("label", function="none")
    found = agreement.compare(*(columns(label=labels, score=v.tolist()) for v in (values, other))).measures
    assert found["spread_change"] > 0.5
    rare = columns(label=[["a"]] * 29 + [["b"]], score=[[v] for v in values[:, 0]])
    assert agreement.compare(rare, rare).measures["spread_change"] == 0


def test_a_constant_is_compared_by_its_size() -> None:
    assert spread(np.full(5, 4.0)) == 4
    assert spread(np.zeros(5)) == 1
    assert spread(np.array([7.0])) == 7
    assert spread(np.array([0.0, 2.0])) == 1
    assert spread(np.array([[3.0, 4.0]])) == 5


def test_rows_without_an_answer_are_not_compared() -> None:
    """All of them: nothing was compared. Some of them: the others count alone."""
    empty = {"e": pa.array([[], []], pa.list_(pa.struct([("start", pa.int32()), ("score", pa.float32())])))}
    nothing, mask = columns(v=[[], []], t=["", " "], s=["", None]), encode_mask(np.zeros((2, 2), bool), "rle")
    pixels = columns(m=[[{"label": "a", "mask": mask}]])
    for agreement, values, lacking in (
        (Items("e"), empty, "an item"), (Best("e"), empty, "an answer"), (Labels("s"), nothing, "an answer"),
        (Ranking("v"), nothing, "a document"), (Texts("t"), nothing, "a text"),
        (Items("m", "mask", mask_overlap, read=decode_mask), pixels, "an item"),
    ):  # fmt: skip
        found = agreement.compare(values, values)
        assert (found.measures, found.lacking) == ({}, lacking)
    texts = Texts("t").compare(columns(t=["", "", "", "abcd"]), columns(t=["", "", "", "xyzw"]))
    assert texts.measures == {"similarity_mean": 0, "equal": 0}


def test_answers_without_scores_have_no_change_of_scores() -> None:
    found = Best("answer").compare(columns(answer=["1", "2"]), columns(answer=["1", "3"]))
    assert found.measures == {"agreement": 0.5}


def test_entities_boxes_and_masks_are_matched() -> None:
    one = columns(
        e=[[{"entity": "PER", "start": 0, "score": 0.9}, {"entity": "LOC", "start": 5, "score": 0.9}], []]
    )
    other = columns(e=[[{"entity": "LOC", "start": 5, "score": 0.7}], []])
    found = Items("e").compare(one, other)
    assert found.rows.tolist() == [pytest.approx(2 / 3), 1]
    assert found.measures == {
        "f1": pytest.approx(2 / 3),
        "items": 2,
        "score_change_mean": pytest.approx(0.2),
    }
    box = {"xmin": 0, "ymin": 0, "xmax": 10, "ymax": 10}
    near, far = {**box, "xmax": 9}, {**box, "xmin": 8, "xmax": 18}
    for place, same in ((near, 1), (far, 0)):
        found = Items("o", "box", box_overlap).compare(
            columns(o=[[{"label": "cat", "box": box}]]), columns(o=[[{"label": "cat", "box": place}]])
        )
        assert found.measures["f1"] == same
        assert found.measures.get("overlap_mean", 0.9) == 0.9
    mask = np.zeros((4, 4), bool)
    mask[:2] = True
    for form in ("png", "rle"):
        assert mask_overlap(encode_mask(mask, form), encode_mask(mask | mask.T, form)) == pytest.approx(
            8 / 12
        )


def test_answers_that_are_numbers_are_compared() -> None:
    asked = {"question": "late", "noul": 0.9, "choice": None, "score": None}
    agreement = task_class("decision").agreement
    for change, same in (({}, 1), ({"noul": 0.88}, 1), ({"noul": 0.1}, 0), ({"score": 2.0}, 0)):
        found = agreement.compare(columns(answers=[[asked]]), columns(answers=[[{**asked, **change}]]))
        assert found.measures["f1"] == same


def test_numbers_of_a_question_are_compared_by_their_spread() -> None:
    agreement, values = task_class("decision").agreement, np.linspace(0.01, 0.04, 10)
    one, other = (
        columns(answers=[[{"question": "late", "noul": v, "choice": None, "score": None}] for v in side])
        for side in (values, values[::-1])
    )
    found = agreement.compare(one, other).measures
    assert found["f1"] == 1
    assert not agreement.limits["spread_change"].holds(found["spread_change"])
    assert agreement.compare(one, one).measures["spread_change"] == 0


def test_texts_rankings_and_pixels_are_compared() -> None:
    found = Texts("t").compare(columns(t=["same", "abcd"]), columns(t=["same", "abxy"]))
    assert found.measures == {"similarity_mean": 0.75, "equal": 0.5}
    ranks = Ranking("s").compare(columns(s=[[1.0, 2.0], []]), columns(s=[[2.0, 1.0], []]))
    assert ranks.measures["agreement"] == 0
    alone = Ranking("s").compare(columns(s=[[0.9], [8.0], []]), columns(s=[[0.1], [6.0], []]))
    assert alone.measures == {
        "agreement": 1, "cosine_mean": 1, "score_change_mean": pytest.approx(0.525),
        "spread_change": pytest.approx(1.4 / 3.55),
    }  # fmt: skip
    depth = Pixels("d").compare(columns(d=[[[0.0, 1.0], [2.0, 4.0]]]), columns(d=[[[0.0, 1.0], [2.0, 3.0]]]))
    assert depth.measures["pixel_change_mean"] == pytest.approx(0.25 / 4)
    black = Pixels("d").compare(
        columns(d=[[[0.0, 0.0]], [[0.0, 8.0]]]), columns(d=[[[0.0, 0.1]], [[0.0, 8.0]]])
    )
    assert black.measures == {"pixel_change_mean": pytest.approx(0.05 / 8 / 2), "spread_change": 0}
    wide = [[0.0, 1000.0], [0.01, 0.03]]  # one map hides what becomes of the other
    lost = Pixels("d").compare(columns(d=[[row] for row in wide]), columns(d=[[wide[0]], [[0.03, 0.01]]]))
    assert lost.measures["pixel_change_mean"] < 1e-4
    assert lost.measures["spread_change"] == pytest.approx(1)
    size = Pixels("d").compare(columns(d=[[[0.0, 1.0]]]), columns(d=[[[0.0, 1.0], [0.0, 1.0]]]))
    assert size.measures == {"pixel_change_mean": 1, "spread_change": 1}


@pytest.mark.parametrize("letters", ["abcdefgh   ", "".join(map(chr, range(0x4E00, 0x5000)))])
def test_long_texts_are_compared_in_a_moment(letters: str) -> None:
    random = np.random.default_rng(0)
    text = "".join(random.choice(list(letters), 6000))
    other = "".join(random.choice(list(letters)) if random.random() < 0.02 else one for one in text)
    begun = time.process_time()
    found = Texts("t").compare(columns(t=[text]), columns(t=[other])).measures["similarity_mean"]
    assert time.process_time() - begun < 1
    assert 0.85 < found < 0.99


def test_limits_hold_for_numbers_only() -> None:
    assert Limit(0.5).holds(0.5)
    assert not Limit(0.5).holds(float("nan"))
    assert not Limit(0.5, most=True).holds(0.6)
    assert Limit().holds(0.0)


def test_each_task_has_a_measure_or_is_known_to_have_none() -> None:
    """Sound and matched keypoints vary continuously, and no limit is known for them."""
    without = {name for name in TASKS if task_class(name).agreement is None}
    assert without == {"text-to-audio", "keypoint-matching"}

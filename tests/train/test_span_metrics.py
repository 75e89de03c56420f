"""Metrics of spans and of answers, against cases worked out by hand from the rules of conlleval and SQuAD."""

from __future__ import annotations

import pytest

from hfbatch.train.metrics.answers import answer_scores, exact_match, normal_answer, overlap_f1
from hfbatch.train.metrics.spans import span_scores, spans_of, to_iob2

READ = {
    "O B-X I-X O": [("X", 1, 3)],
    "I-X I-X O I-X": [("X", 0, 2), ("X", 3, 4)],
    "I-X B-X I-X": [("X", 0, 1), ("X", 1, 3)],
    "B-X B-X": [("X", 0, 1), ("X", 1, 2)],
    "I-X I-Y": [("X", 0, 1), ("Y", 1, 2)],
    "B-X I-Y I-Y": [("X", 0, 1), ("Y", 1, 3)],
    "O O": [],
    "X X O Y": [("X", 0, 2), ("Y", 3, 4)],
    "B-a-b I-a-b": [("a-b", 0, 2)],
}


@pytest.mark.parametrize("tags", READ)
def test_tags_are_read_as_the_conll_script_reads_them(tags):
    assert spans_of(tags.split()) == READ[tags]
    assert spans_of(to_iob2(tags.split())) == READ[tags]


def test_iob1_becomes_iob2():
    tags, iob2 = "I-X I-X B-X O I-X I-Y X", "B-X I-X B-X O B-X B-Y X"
    assert to_iob2(tags.split()) == iob2.split()


def test_a_span_is_right_as_a_whole_or_not_at_all():
    truth = [row.split() for row in ("B-X I-X O B-Y", "O B-X O", "B-Y I-Y O")]
    guess = [row.split() for row in ("B-X I-X O B-X", "O B-X I-X", "I-Y I-Y O")]
    # of 4 there and 4 found, 2 are right: the first X, and the last Y although it begins with I-
    assert span_scores(truth, guess) == pytest.approx(
        {"precision": 0.5, "recall": 0.5, "f1": 0.5, "accuracy": 8 / 10, "f1_X": 0.4, "f1_Y": 2 / 3}
    )


def test_spans_of_different_texts_never_touch():
    assert span_scores([["B-X"], ["I-X"]], [["B-X"], ["B-X"]])["f1"] == 1


def test_no_span_found_scores_nothing():
    assert span_scores([["B-X", "O"]], [["O", "O"]]) == {
        "precision": 0, "recall": 0, "f1": 0, "accuracy": 0.5, "f1_X": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat's pyjamas!", "cats pyjamas"),
        ("a an the", ""),
        ("theatre of An ant", "theatre of ant"),
        ("U.S.", "us"),
        ("10,000", "10000"),
        (" un-\tknown\n", "un known"),
        ("Ünïcode – dash", "ünïcode – dash"),
    ],
)
def test_answers_are_compared_when_normal(text, normal):
    assert normal_answer(text) == normal


@pytest.mark.parametrize(
    ("truth", "guess", "exact", "f1"),
    [
        ("the national anthem", "National Anthem.", 1, 1),
        ("the national anthem", "national anthem today", 0, 0.8),
        ("New York", "York York", 0, 0.5),
        ("Paris", "Rome", 0, 0),
        ("", "", 1, 1),
        ("", "Rome", 0, 0),
        ("Rome", "the", 0, 0),
    ],
)
def test_exact_match_and_f1_of_words(truth, guess, exact, f1):
    assert exact_match(truth, guess) == exact
    assert overlap_f1(truth, guess) == pytest.approx(f1)


def test_the_closest_of_several_right_answers_counts():
    assert answer_scores([["Rome", "in Rome today"], ["Paris"]], ["in Rome", "paris"]) == pytest.approx(
        {"exact_match": 0.5, "f1": 0.9}
    )


def test_questions_without_an_answer_count_for_an_empty_one():
    found = answer_scores([[], [], ["Rome"]], ["", "Rome", "in Rome"])
    assert found == pytest.approx(
        {
            "exact_match": 1 / 3,
            "f1": (1 + 2 / 3) / 3,
            "exact_match_answerable": 0,
            "f1_answerable": 2 / 3,
            "accuracy_unanswerable": 0.5,
        }
    )

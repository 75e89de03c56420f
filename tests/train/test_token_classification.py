"""Training token-classification: every word is learnt and scored once, whatever its pieces and windows."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pyarrow as pa
import pytest
import torch

from hfbatch.tasks import task_class
from hfbatch.train.data.rows import ROW
from tests.models.text import tiny_llama
from tests.tasks.drive import make, run
from tests.train.drive import Bench

WORDS = [
    ["The", "engineer", "reads", "the", "blue", "mountain"],
    ["Monday", "forgets", "numbers", "before", "dawn", "."],
    ["Every", "large", "cluster"],
    ["A", "quiet", "river", "crosses", "engineer", "mountain", "slowly"],
]
TAGS = [
    ["O", "I-WHO", "O", "O", "I-WHAT", "I-WHAT"],
    ["I-WHEN", "O", "I-WHAT", "O", "I-WHEN", "O"],
    ["O", "I-WHO", "I-WHO"],
    ["O", "I-WHO", "I-WHO", "O", "I-WHO", "I-WHAT", "O"],
]
"""IOB1: nothing has a B-."""
LABELS = ["O", "B-WHAT", "I-WHAT", "B-WHEN", "I-WHEN", "B-WHO", "I-WHO"]
SPAN = pa.list_(pa.struct([("start", pa.int64()), ("end", pa.int64()), ("label", pa.string())]))


def spans_of_rows() -> tuple[list[str], list[list[dict[str, object]]]]:
    """The rows as texts with spans of characters."""
    texts, spans = [" ".join(words) for words in WORDS], []
    for words, tags in zip(WORDS, TAGS, strict=True):
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        found: list[dict[str, object]] = []
        for word, end, tag, before in zip(words, ends.tolist(), tags, ["O", *tags], strict=False):
            if tag == "O":
                continue
            if tag == before:
                found[-1]["end"] = end
            else:
                found.append({"start": end - len(word), "end": end, "label": tag[2:]})
        spans.append(found)
    return texts, spans


def columns(form: str) -> dict[str, object]:
    if form == "words":
        return {"tokens": WORDS, "tags": TAGS}
    texts, spans = spans_of_rows()
    return {"text": texts, "spans": pa.array(spans, SPAN)}


def bench(encoder: str, form: str = "words", **options: object) -> Bench:
    return Bench("token-classification", encoder, columns(form), **options)


def test_the_loss_is_that_of_transformers(encoder):
    ready = bench(encoder).ready()
    batch = ready.batch()
    torch.testing.assert_close(ready.loss(batch), ready.model(**batch).loss)


def test_a_step_has_the_same_loss_however_it_is_cut(encoder):
    ready = bench(encoder).ready()
    whole = ready.batch()
    items = int(whole["labels"].ne(-100).sum())
    parts = [ready.loss(ready.batch(*numbers), items) for numbers in ([0], [1, 2], [3])]
    torch.testing.assert_close(sum(parts), ready.loss(whole))


@pytest.mark.parametrize("form", ["words", "spans"])
def test_the_trained_model_finds_the_spans_that_it_was_given(encoder, form, tmp_path):
    ready = bench(encoder, form).ready()
    first, last = ready.learn(60)
    assert last < first / 2
    assert ready.recipe.labels == LABELS
    found = ready.metrics()
    assert found["f1"] == found["accuracy"] == found["f1_WHO"] == 1
    ready.model.save_pretrained(tmp_path)
    ready.recipe.processor.save_pretrained(tmp_path)
    texts, spans = spans_of_rows()
    task = make(task_class("token-classification"), str(tmp_path), aggregation_strategy="simple")
    entities = run(task, {"text": texts}, 4)["entities"].to_pylist()
    assert [
        [{"start": one["start"], "end": one["end"], "label": one["entity_group"]} for one in row]
        for row in entities
    ] == spans


def test_both_forms_of_a_row_and_both_forms_of_tags_are_the_same(encoder):
    iob2 = [["O", "B-WHO", "O", "O", "B-WHAT", "I-WHAT"], ["B-WHEN", "O", "B-WHAT", "O", "B-WHEN", "O"]]
    iob2 += [["O", "B-WHO", "I-WHO"], ["O", "B-WHO", "I-WHO", "O", "B-WHO", "B-WHAT", "O"]]
    tables = [
        bench(encoder).ready().features,
        bench(encoder, "spans").ready().features,
        Bench("token-classification", encoder, {"tokens": WORDS, "tags": iob2}).ready().features,
    ]
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


def test_pieces_of_a_word_go_on_with_its_tag_or_are_left_open(encoder):
    rows = {"tokens": [["engineer", "mountain", "dawn"]], "tags": [["B-X", "O", "B-Y"]]}
    for pieces, expected in (
        ("all", ["B-X", "I-X", "O", "O", "B-Y"]),
        ("first", ["B-X", "", "O", "", "B-Y"]),
    ):
        ready = Bench("token-classification", encoder, rows, params={"pieces": pieces}).ready()
        names = [*ready.recipe.labels, ""]
        labels = ready.features["labels"].to_pylist()[0]
        assert labels[0] == labels[-1] == -100
        assert [names[max(label, -1)] for label in labels[1:-1]] == expected
        assert ready.features["word"].to_pylist()[0] == [-1, 0, -1, 1, -1, 2, -1]


def test_a_long_row_is_read_in_windows_and_each_word_is_scored_once(encoder):
    some = [0, 1, 2, 3, 0, 1]
    long = {"tokens": [[*chain(*(WORDS[k] for k in some))], WORDS[0]]}
    long["tags"] = [[*chain(*(TAGS[k] for k in some))], TAGS[0]]
    whole = Bench("token-classification", encoder, long).ready().features
    options = {"batch": {"max_length": 20}, "params": {"stride": 7}}
    cut = Bench("token-classification", encoder, long, **options).ready()
    table = cut.features
    assert whole[ROW].to_pylist() == [0, 1]
    assert table[ROW].to_pylist() == [0] * (len(table) - 1) + [1]
    assert table["tags"].to_pylist()[0] == whole["tags"].to_pylist()[0]
    assert table["tags"].to_pylist()[1:-1] == [[]] * (len(table) - 2)
    words = [word for words in table["word"].to_pylist()[:-1] for word in words if word >= 0]
    assert sorted(words) == list(range(len(long["tokens"][0])))
    once = whole["labels"].to_pylist()[0][1:-1]
    windows = [labels[1:-1] for labels in table["labels"].to_pylist()[:-1]]
    assert windows == [once[start : start + 18] for start in range(0, len(once) - 7, 11)]
    right = [(np.array([max(label, 0) for label in labels]), 0.0) for labels in table["labels"].to_pylist()]
    assert cut.recipe.score(right, table)["accuracy"] == 1
    unread = [
        (np.where(np.array(word) < 0, 1, row), loss)
        for word, (row, loss) in zip(table["word"].to_pylist(), right, strict=True)
    ]
    assert cut.recipe.score(unread, table)["accuracy"] == 1


def test_tokens_that_begin_with_the_space_before_a_word_are_of_that_word(tmp_path):
    ready = bench(tiny_llama(tmp_path)).ready()
    rows = zip(ready.features["word"].to_pylist(), ready.features["input_ids"].to_pylist(), TAGS, strict=True)
    for words, tokens, tags in rows:
        assert [word for word in words if word >= 0] == list(range(len(tags)))
        first = [ready.recipe.task.tokenizer.decode(tokens[words.index(word)]) for word in range(len(tags))]
        assert all(text.startswith(" ") for text in first[1:])
    assert ready.learn(60)[1] < 0.1
    assert ready.metrics()["f1"] == 1


def test_a_word_that_the_tokenizer_drops_counts_as_outside(encoder):
    rows = {"tokens": [["engineer", "\u200b", "dawn"]], "tags": [["B-X", "I-X", "O"]]}
    ready = Bench("token-classification", encoder, rows).ready()
    assert ready.features["word"].to_pylist()[0] == [-1, 0, -1, 2, -1]
    right = [(np.maximum(np.array(ready.features["labels"].to_pylist()[0]), 0), 0.0)]
    found = ready.recipe.score(right, ready.features)
    assert (found["accuracy"], found["f1"]) == (pytest.approx(2 / 3), 0)


def test_a_span_that_ends_inside_a_word_takes_what_is_its_own(encoder):
    rows = {"text": ["the mountain, dawn"], "spans": pa.array([[{"start": 4, "end": 9, "label": "X"}]], SPAN)}
    ready = Bench("token-classification", encoder, rows).ready()
    names = np.array(ready.recipe.labels)
    assert names[ready.features["tags"].to_pylist()[0]].tolist() == ["O", "B-X", "O", "O", "O"]
    assert names[ready.features["labels"].to_pylist()[0][1:-1]].tolist() == ["O", "B-X", "O", "O", "O"]


def test_tags_that_are_numbers_are_classes_or_have_names(encoder):
    rows = {"tokens": WORDS, "tags": [[0, 1, 0, 0, 2, 10], [0] * 6, [0, 1, 2], [0] * 7]}
    plain = Bench("token-classification", encoder, rows).ready().recipe
    assert (plain.labels, plain.metric) == (["0", "1", "2", "10"], "accuracy")
    assert "give their names in order, such as --param tag_names=[O,B-PER,I-PER]" in plain.notes[0]
    names = ["O", "B-X", "I-X", *"abcdefg", "B-Y"]
    named = Bench("token-classification", encoder, rows, params={"tag_names": names}).ready().recipe
    assert (named.labels, named.metric, named.notes) == (["O", "B-X", "I-X", "B-Y", "I-Y"], "f1", [])
    few = Bench("token-classification", encoder, rows, params={"tag_names": names[:10]})
    assert few.validate().faults == ["rows.parquet row 0: tag 5 is null or beyond the 10 of params.tag_names"]


def test_the_guess_without_a_model_is_the_commonest_tag(encoder):
    ready = bench(encoder).ready()
    found = ready.recipe.baseline(ready.features)
    assert (found["accuracy"], found["f1"]) == (pytest.approx(10 / 22), 0)


def test_faults_of_words_name_file_and_row(encoder):
    rows = {
        "tokens": [["a", "b"], None, ["a"], ["a", None], ["a"], []],
        "tags": [["O"], ["O"], None, ["O", "O"], [""], []],
    }
    assert Bench("token-classification", encoder, rows).validate().faults == [
        "rows.parquet row 0: 2 tokens have 1 tags; give each token one",
        "rows.parquet row 1: tokens is null or empty",
        "rows.parquet row 2: tags is null",
        "rows.parquet row 3: token 1 is null",
        "rows.parquet row 4: tag 0 is empty",
        "rows.parquet row 5: tokens is null or empty",
    ]


def test_faults_of_spans_name_file_and_row(encoder):
    def span(start: int, end: int, label: str | None = "X") -> dict[str, object]:
        return {"start": start, "end": end, "label": label}

    spans = [[span(0, 9)], [span(2, 4), span(0, 3)], [span(1, 2)], None, [], [span(0, 1, None)], [span(2, 2)]]
    texts = ["a b c"] * 4 + [""] + ["a b c"] * 2
    found = (
        Bench("token-classification", encoder, {"text": texts, "spans": pa.array(spans, SPAN)})
        .validate()
        .faults
    )
    assert found == [
        "rows.parquet row 0: span 0 to 9 is outside the text, which has 5 characters, or empty",
        "rows.parquet row 1: spans 0 to 3 and 2 to 4 overlap",
        "rows.parquet row 2: span 1 to 2 is only whitespace",
        "rows.parquet row 3: spans is null; give an empty list where there is none",
        "rows.parquet row 4: text is null or empty",
        "rows.parquet row 5: span {'start': 0, 'end': 1, 'label': None} lacks its start, end or label",
        "rows.parquet row 6: span 2 to 2 is outside the text, which has 5 characters, or empty",
    ]


@pytest.mark.parametrize(
    ("tags", "fault"),
    [
        (
            ["B-X", "E-X", "S-Y"],
            "tags are of several forms: 'E-X', 'S-Y' beside 'B-X'; write spans as B-KIND",
        ),
        (["O", "O", "O"], "the tag 'O'; there is nothing to train on"),
    ],
)
def test_tags_that_are_no_spans_are_refused(encoder, tags, fault):
    (found,) = Bench("token-classification", encoder, {"tokens": [["a", "b", "c"]], "tags": [tags]}).fit()
    assert fault in found


def test_half_a_row_is_refused(encoder):
    recipe = bench(encoder).recipe
    assert recipe.column_faults({"tokens", "tags"}) == recipe.column_faults({"text", "spans"}) == []
    (fault,) = recipe.column_faults({"tokens", "text"})
    assert "needs columns 'tokens' and 'tags', or 'text' and 'spans'" in fault

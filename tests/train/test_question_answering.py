"""Training question-answering: answers are learnt in every window that has them whole, and scored once a question."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from hfbatch.train.data.rows import ROW
from tests.models.text import CORPUS
from tests.train.drive import Bench

SQUAD = pa.struct([("text", pa.list_(pa.string())), ("answer_start", pa.list_(pa.int32()))])
SHORT = {"batch": {"max_length": 24}, "params": {"doc_stride": 8}}
LONG, ANSWER = " ".join(CORPUS[:5]), "a table of numbers"


def rows(*, unanswerable: bool = False) -> dict[str, object]:
    """Questions after what stands in a context; one without an answer where asked for."""
    asked = [
        ("who reads?", CORPUS[0], "engineer"),
        ("who crosses?", CORPUS[-1], "large cluster"),
        ("what model?", LONG, ANSWER),
        ("what day?", CORPUS[1], "Monday"),
    ]
    starts = [[context.index(text)] for _, context, text in asked]
    if unanswerable:
        asked[3] = ("what day?", CORPUS[0], "")
        starts[3] = []
    return {
        "question": [question for question, *_ in asked],
        "context": [context for _, context, _ in asked],
        "answers": [[text] if text else [] for *_, text in asked],
        "answer_starts": starts,
    }


def bench(encoder: str, *, unanswerable: bool = False, **options: object) -> Bench:
    return Bench("question-answering", encoder, rows(unanswerable=unanswerable), **options)


def test_the_loss_is_that_of_transformers_without_padding(encoder):
    ready = bench(encoder, **SHORT).ready()
    for number in range(len(ready.features)):
        batch = ready.batch(number)
        labels = batch.pop("labels")
        theirs = ready.model(**batch, start_positions=labels[:, 0], end_positions=labels[:, 1]).loss
        torch.testing.assert_close(ready.loss({**batch, "labels": labels}), theirs)


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_a_step_has_the_same_loss_however_it_is_cut_and_padded(encoder, smoothing):
    ready = bench(encoder, schedule={"label_smoothing": smoothing}).ready()
    whole = ready.batch()
    assert "attention_mask" in whole  # that is, padding
    items = int(whole["labels"].ne(-100).sum())
    parts = [
        ready.loss(ready.batch(*numbers), items) for numbers in ([0], [1, 2], range(3, len(whole["labels"])))
    ]
    torch.testing.assert_close(sum(parts), ready.loss(whole))


def test_label_smoothing_is_that_of_torch_over_the_tokens_of_a_window(encoder):
    ready = bench(encoder, schedule={"label_smoothing": 0.1}).ready()
    batch = ready.batch(0)
    output, labels = (
        ready.model(input_ids=batch["input_ids"], token_type_ids=batch["token_type_ids"]),
        batch["labels"],
    )
    logits = torch.cat([output.start_logits, output.end_logits])
    theirs = torch.nn.functional.cross_entropy(logits, labels[0, :2], label_smoothing=0.1)
    torch.testing.assert_close(ready.loss(batch), theirs)


def test_rows_that_fill_up_a_step_count_for_nothing(encoder):
    ready = bench(encoder).ready()
    filled, alone = ready.collate([0, -1]), ready.batch(0)
    assert filled["labels"][1].tolist() == [-100] * 3
    torch.testing.assert_close(ready.loss(filled), ready.loss(alone))
    for items in (3, 0, None):
        loss = ready.loss(ready.collate([-1]), items)
        loss.backward()
        assert float(loss.detach()) == 0
    gradients = [weight.grad for weight in ready.model.parameters() if weight.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("unanswerable", [False, True])
def test_training_on_rows_improves_the_metrics(encoder, unanswerable):
    ready = bench(encoder, unanswerable=unanswerable, **SHORT).ready()
    first, last = ready.learn(60)
    assert last < first / 2
    found = ready.metrics()
    assert found["exact_match"] == found["f1"] == 1
    baseline = ready.recipe.baseline(ready.features)
    if unanswerable:
        assert (baseline["exact_match"], baseline["accuracy_unanswerable"]) == (0.25, 1)
    else:
        assert baseline == {}


def test_windows_have_the_answer_whole_or_point_to_none(encoder):
    ready = bench(encoder, **SHORT).ready()
    table = ready.features.filter(pa.compute.equal(ready.features[ROW], 2))
    tokenizer, start = ready.recipe.task.tokenizer, LONG.index(ANSWER)
    assert len(table) > 3
    answerable = 0
    for window in table.to_pylist():
        first, last, tokens = window["labels"]
        assert tokens == len(window["input_ids"]) <= 24
        inside = [place for place, at in enumerate(window["start"]) if at >= 0]
        if window["start"][inside[0]] <= start and window["end"][inside[-1]] >= start + len(ANSWER):
            assert tokenizer.decode(window["input_ids"][first : last + 1]) == ANSWER
            assert (window["start"][first], window["end"][last]) == (start, start + len(ANSWER))
            answerable += 1
        else:
            assert (first, last) == (0, 0)
    assert answerable >= 1


def test_a_row_whose_answer_is_longer_than_its_windows_has_no_targets_and_is_counted(encoder):
    columns = {"question": ["who?"] * 2, "context": [LONG] * 2, "answers": [[LONG], [ANSWER]]}
    columns["answer_starts"] = [[0], [LONG.index(ANSWER)]]
    ready = Bench("question-answering", encoder, columns, **SHORT).ready()
    made = ready.recipe.features(ready.columns, ready.places)
    assert made.cut.tolist() == [True, False]
    for row, labels in zip(made.table[ROW].to_pylist(), made.table["labels"].to_pylist(), strict=True):
        assert (labels == [-100] * 3) == (row == 0)


def test_the_best_span_over_all_windows_of_a_question_is_its_answer(encoder):
    ready = bench(encoder, **SHORT).ready()
    table = ready.features
    windows = np.flatnonzero(np.array(table[ROW].to_pylist()) == 2)
    sizes = [len(ids) for ids in table["input_ids"].to_pylist()]
    logits = [
        np.zeros((2, size + 3), np.float32) for size in sizes
    ]  # wider than the window, as of a padded batch
    for number in windows:
        logits[number][:, sizes[number] :] = 99  # padding is no answer
    best = next(number for number in windows if table["labels"][int(number)].as_py()[0] > 0)
    first, last, _ = table["labels"][int(best)].as_py()
    logits[best][0, first] = logits[best][1, last] = 9
    found = ready.recipe.score(logits, table)
    assert found["exact_match"] == 0.25


def test_both_forms_of_answers_are_the_same(encoder):
    flat = rows(unanswerable=True)
    squad = [
        {"text": texts, "answer_start": starts}
        for texts, starts in zip(flat.pop("answers"), flat.pop("answer_starts"), strict=True)
    ]
    nested = Bench("question-answering", encoder, {**flat, "answers": pa.array(squad, SQUAD)}).ready()
    assert nested.features.equals(bench(encoder, unanswerable=True).ready().features)
    assert nested.validate().labels == {"answerable": 3, "unanswerable": 1}


def test_faults_of_rows_name_file_and_row(encoder):
    cases = [
        ("who?", "a river", ["river"], [1]),
        ("who?", "a river", ["river"], [9]),
        ("who?", "a river", ["a", "b"], [0]),
        ("who?", "a river", None, [0]),
        ("who?", "a river", [" "], [1]),
        (None, "a river", ["a"], [0]),
        ("who?", " ", [], []),
        ("river " * 70, "a river", ["a"], [0]),
        ("who?", "a river", [None], [0]),
        ("who?", "a river", [], []),
    ]
    names = ("question", "context", "answers", "answer_starts")
    found = Bench(
        "question-answering", encoder, dict(zip(names, map(list, zip(*cases, strict=True)), strict=True))
    ).validate()
    assert found.faults == [
        f"rows.parquet row {row}: {fault}"
        for row, fault in enumerate(
            [
                "answer 'river' is not at its offset 1, where the context has ' rive'",
                "answer 'river' at 9 is outside the context, which has 7 characters",
                "2 answers have 1 starts; give each answer one",
                "answers is null; give empty lists where there is none",
                "answer ' ' at 1 is null or empty; give empty lists where there is none",
                "question is null",
                "context is empty",
                "question leaves no room for its context in 64 tokens",
                "answer None at 0 is null or empty; give empty lists where there is none",
            ]
        )
    ]


def test_rows_without_any_answer_and_answers_without_starts_are_refused(encoder):
    columns = {"question": ["who?"], "context": ["a river"], "answers": pa.array([[]], pa.list_(pa.string()))}
    (fault,) = Bench("question-answering", encoder, columns).validate().faults
    assert fault == "answers has no offsets; use --column answer_starts=COLUMN for the start of each answer"
    columns["answer_starts"] = pa.array([[]], pa.list_(pa.int64()))
    (fault,) = Bench("question-answering", encoder, columns).fit()
    assert fault == "no training row has an answer; there is nothing to train on"

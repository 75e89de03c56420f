"""Rows that take several calls of the model: their windows share batches, and each row comes back whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast, RobertaConfig, pipeline

from hfbatch.engines.base import EngineConfig
from hfbatch.engines.torch import TorchEngine
from hfbatch.runtime.autotune import choose_batch_size
from hfbatch.runtime.predictor import BatchStats, Predictor
from hfbatch.runtime.prepare import POSITION, postprocess, preprocess
from hfbatch.runtime.windows import unfold
from hfbatch.tasks import task_class
from hfbatch.tasks.text.question_answering import QuestionAnswering
from hfbatch.tasks.text.windows import pair_up
from tests.models.text import (
    CORPUS,
    bytes_tokenizer,
    labels_of,
    save,
    tiny_bert,
    tiny_bert_for,
    wordpiece_tokenizer,
)
from tests.tasks.drive import features_of, make, run
from tests.tasks.test_pipeline_tasks import LABELS, NLI, TAGS, assert_alike, near

ODD = ["naïve café, 北京 and 😀 smile", "a  b   c", "RIVER-side, can't!"]
TEXTS = [*CORPUS[:4], " ".join(CORPUS[8:20]), *ODD, "river " * 90, *CORPUS[30:33], "x"]


def tiny_roberta(folder: Path, head: str, **config: Any) -> str:
    """A RoBERTa over bytes, whose tokens carry the space in front of them. :returns: its folder."""
    tokenizer = bytes_tokenizer(
        64, pad_token="<pad>", mask_token="<mask>", unk_token="<unk>", add_prefix_space=True
    )
    torch.manual_seed(0)
    settings = RobertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=80, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3, **config,
    )  # fmt: skip
    return save(folder, getattr(transformers, f"RobertaFor{head}")(settings), tokenizer)


class Poisoned(QuestionAnswering):
    """Raises on a batch with a window that holds a certain token."""

    token = -1

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if bool((batch["input_ids"] == self.token).any()):
            raise ValueError("poison")
        return super().forward(model, batch)


def long_contexts(folder: Path) -> tuple[Poisoned, pa.Table]:
    """Thirty rows of one to many windows; of rows 3 and 11, one window or two hold the poison."""
    task = make(Poisoned, tiny_bert_for(folder, "QuestionAnswering"), max_seq_len=24, doc_stride=4, top_k=2)
    contexts = [" ".join(CORPUS[k : k + 1 + k % 9]) for k in range(30)]
    contexts[3], contexts[11] = f"{contexts[3]} @ {contexts[5]}", f"@ {contexts[11]}"
    task.token = task.tokenizer.convert_tokens_to_ids("@")
    return task, features_of(task, {"question": ["who reads?"] * 30, "context": contexts}).table


@pytest.mark.parametrize("size", [1, 8])
def test_a_window_that_fails_rejects_its_row_and_no_other(tmp_path: Path, size: int) -> None:
    task, features = long_contexts(tmp_path)
    stats: list[BatchStats] = []
    engine = TorchEngine(EngineConfig(task.model.folder, task.auto_class, "float32"))
    found = Predictor(task, engine, size, on_batch=stats.append).predict(features)
    assert [(row, str(error)) for row, error in sorted(found.failures)] == [(3, "poison"), (11, "poison")]
    assert found.kept.tolist() == [row for row in range(30) if row not in (3, 11)]
    windows = unfold(task, features)
    assert len(windows.table) > 100
    counts = np.bincount(windows.row)[found.kept]
    assert [len(row) for row in found.outputs["none"].to_pylist()] == counts.tolist()
    assert sum(one.rows for one in stats) == 29  # all but row 11, whose first window failed
    assert found.tokens <= windows.lengths.sum() == task.lengths(features).sum()
    if size == 8:
        assert found.batches < len(windows.table) / 4  # windows of many rows in each


@pytest.mark.parametrize("kind", ["ConvBert", "FNet"])
def test_models_that_see_padding_get_none(tmp_path: Path, kind: str) -> None:
    tokenizer = wordpiece_tokenizer(64)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "embedding_size": 32}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, num_attention_heads=4, vocab_size=len(tokenizer), initializer_range=0.4, **labels_of(TAGS)
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForTokenClassification")(config)
    task = make(task_class("token-classification"), save(tmp_path, model, tokenizer))
    engine = TorchEngine(EngineConfig(task.model.folder, task.auto_class, "float32"))
    engine.pad_multiple = 8  # as on a GPU
    found = Predictor(task, engine, 8).predict(features_of(task, {"text": TEXTS}).table)
    assert found.batches < len(TEXTS)
    oracle = pipeline("token-classification", task.model.folder, device="cpu")
    oracle.tokenizer.model_max_length = 64
    (entities,) = task.postprocess(found.outputs, {"text": pa.array(TEXTS)})
    assert_alike(pa.table([entities], names=["entities"]), [(oracle(text),) for text in TEXTS])


def test_batches_of_windows_are_chosen_and_ordered_freely(tmp_path: Path) -> None:
    task, features = long_contexts(tmp_path)
    task.token = -1
    engine = TorchEngine(EngineConfig(task.model.folder, task.auto_class, "float32"))
    assert choose_batch_size(task, engine, features, 1_000_000) in engine.batch_sizes
    columns = {"question": ["who reads?"] * 9, "context": [" ".join(CORPUS[k : 2 * k + 1]) for k in range(9)]}
    windows = len(unfold(task, features_of(task, columns).table).table)
    straight = run(task, columns, 1).to_pylist()
    shuffled = run(task, columns, 5, 8, np.random.default_rng(0).permutation(windows)).to_pylist()
    for one, other in zip(straight, shuffled, strict=True):
        for left, right in zip(one["answers"], other["answers"], strict=True):
            assert left == {**right, "score": pytest.approx(left["score"], abs=1e-6)} or right == left
            assert abs(left["score"] - right["score"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "head", "columns", "params", "rejected"),
    [
        ("question-answering", "QuestionAnswering", ("question", "context"), {"max_seq_len": 30}, [2, 4]),
        ("token-classification", "TokenClassification", ("text",), {"aggregation_strategy": "max"}, [2]),
        (
            "zero-shot-classification",
            "SequenceClassification",
            ("text",),
            {"candidate_labels": LABELS},
            [2, 5],
        ),
        ("fill-mask", "MaskedLM", ("text",), {}, [0, 1, 2, 4, 5, 6]),
    ],
)
def test_rows_that_cannot_be_read_are_rejected_and_the_others_keep_their_place(
    tmp_path: Path,
    name: str,
    head: str,
    columns: tuple[str, ...],
    params: dict[str, Any],
    rejected: list[int],
) -> None:
    texts = ["dawn", "the river", None, "a [MASK]", "what " * 60, "", "night"]
    labels = None if head == "QuestionAnswering" else NLI
    task = make(task_class(name), tiny_bert_for(tmp_path, head, id2label=labels), **params)
    arrays = {column: pa.array(texts) for column in columns}
    places = pa.table({"file": ["a"] * 7, "row": range(7)})
    prepared = preprocess(task, arrays, places)
    engine = TorchEngine(EngineConfig(task.model.folder, task.auto_class, "float32"))
    features = prepared.features.drop_columns([POSITION])
    found = Predictor(task, engine, 4).predict(features)
    positions = prepared.features[POSITION].to_numpy()[found.kept]
    outputs = found.outputs.append_column(POSITION, pa.array(positions))
    kept, answers, failures = postprocess(task, task.output_fields(), outputs, arrays)
    assert failures == []
    assert sorted(one.position for one in prepared.rejects) == rejected
    assert kept.tolist() == [row for row in range(7) if row not in rejected]
    good = {column: [texts[row] for row in kept] for column in columns}
    for got, alone in zip(answers, run(task, good, 1).columns, strict=True):
        assert near(got.to_pylist(), alone.to_pylist())


@pytest.fixture(scope="module")
def taggers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """A BERT, whose tokenizer marks the pieces of a word, and a RoBERTa, whose tokenizer marks spaces."""
    folder = tmp_path_factory.mktemp("taggers")
    return {
        True: tiny_bert_for(folder / "bert", "TokenClassification", id2label=TAGS),
        False: tiny_roberta(folder / "roberta", "TokenClassification", **labels_of(TAGS)),
    }


STRATEGIES, STRIDES = ("simple", "first", "average", "max"), (None, 0, 9)
WAYS = [
    ((k + i + words) % 2 == 0, strategy, stride, words)
    for k, strategy in enumerate(STRATEGIES)
    for i, stride in enumerate(STRIDES)
    for words in (False, True)
]
"""Strategies, strides and kinds of rows, each with each; half of them for each kind of tokenizer."""


@pytest.mark.parametrize(("marked", "strategy", "stride", "words"), WAYS)
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_entities_of_words_and_texts_over_windows(
    taggers: dict[bool, str], marked: bool, strategy: str, stride: int | None, words: bool
) -> None:
    folder = taggers[marked]
    options: dict[str, Any] = {"aggregation_strategy": strategy}
    oracle = pipeline("token-classification", folder, device="cpu", **options)
    oracle.tokenizer.model_max_length = 64
    task = make(task_class("token-classification"), folder, 64, stride=stride, delimiter="_", **options)
    assert task.check() == []
    given = {} if stride is None else {"stride": stride}
    if words:
        rows = [text.split() for text in TEXTS]
        expected = [tuple(oracle(row, is_split_into_words=True, delimiter="_", **given)) for row in rows]
        assert_alike(run(task, {"words": rows}, 8, 8), expected)
    else:
        assert_alike(run(task, {"text": TEXTS}, 8, 8), [(oracle(text, **given),) for text in TEXTS])


def test_entities_are_there_to_be_compared(taggers: dict[bool, str]) -> None:
    task = make(task_class("token-classification"), taggers[False], aggregation_strategy="average")
    found = run(task, {"text": TEXTS})["entities"].to_pylist()
    assert len({one["entity_group"] for row in found for one in row}) == 2
    assert len({len(row) for row in found}) > 5


def test_faults_of_a_stride(tmp_path: Path) -> None:
    folder = tiny_bert_for(tmp_path, "TokenClassification", id2label=TAGS)
    (alone,) = make(task_class("ner"), folder, stride=4).check()
    assert "aggregation_strategy" in alone
    (wide,) = make(task_class("ner"), folder, 20, stride=18, aggregation_strategy="max").check()
    assert "at most 17" in wide


@pytest.mark.parametrize("limit", [None, 40, 14])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("tokenizer", [wordpiece_tokenizer(64), bytes_tokenizer(64)], ids=["marked", "bytes"])
def test_pairs_are_joined_as_the_tokenizer_joins_them(
    tokenizer: PreTrainedTokenizerFast, side: str, limit: int | None
) -> None:
    tokenizer.truncation_side = side
    partners = [["it is work", "night"], ["a.", "", "the river"]] * 6
    texts = TEXTS[:12]
    found, cut = pair_up(tokenizer, texts, partners, limit)
    pairs = [(text, other) for text, row in zip(texts, partners, strict=True) for other in row]
    for place, (text, other) in enumerate(pairs):
        truncation = "only_first" if limit else False
        (ids,) = (expected := tokenizer([text], [other], truncation=truncation, max_length=limit))[
            "input_ids"
        ]
        assert found["input_ids"][place] == ids
        if "token_type_ids" in expected:
            assert found["token_type_ids"][place] == expected["token_type_ids"][0]
        whole = len(tokenizer([text], [other])["input_ids"][0])
        assert cut[place] == (limit is not None and whole > limit)
    assert any(cut) == (limit is not None)
    with pytest.raises(ValueError, match="leaves no room"):
        pair_up(tokenizer, ["the river"], [["dawn " * 50]], 20)


@pytest.mark.parametrize("several", [False, True])
def test_each_row_brings_its_own_labels(tmp_path: Path, several: bool) -> None:
    folder = tiny_bert_for(tmp_path, "SequenceClassification", id2label=NLI, initializer_range=0.5)
    labels = [["weather", "work", "night", "engineer"][: 1 + k % 4] for k in range(len(TEXTS))]
    oracle = pipeline("zero-shot-classification", folder, device="cpu")
    oracle.tokenizer.model_max_length = 64
    expected = [oracle(text, row, multi_label=several) for text, row in zip(TEXTS, labels, strict=True)]
    assert len({one["labels"][0] for one in expected}) > 2
    task = make(task_class("zero-shot-classification"), folder, multi_label=several)
    columns = {"text": TEXTS, "candidate_labels": labels}
    assert_alike(run(task, columns), [(one["labels"], one["scores"]) for one in expected])
    assert features_of(task, columns).truncated == 2


def test_labels_have_to_come_from_somewhere(tmp_path: Path) -> None:
    folder = tiny_bert_for(tmp_path, "SequenceClassification", id2label=TAGS)
    task = make(task_class("zero-shot-classification"), folder, hypothesis_template="no place for it")
    (fault,) = task.check()
    assert "hypothesis_template" in fault
    assert "its last class" in task.notes()[0]
    assert "no labels" in task.column_faults({"text"})[0]
    assert task.column_faults({"text", "candidate_labels"}) == []
    fixed = make(task_class("zero-shot-classification"), folder, candidate_labels=["a"])
    assert fixed.column_faults({"text"}) == []
    assert fixed.labels_of({"text": ["x"]}) == [["a"]]
    assert fixed.labels_of({"text": ["x"], "candidate_labels": pa.array([["b"]])}) == [["b"]]
    for labels in ([], ["a", None]):
        with pytest.raises(ValueError, match="at least one candidate label"):
            features_of(task, {"text": ["x"], "candidate_labels": [labels]})


def test_rows_without_documents_have_no_scores(tmp_path: Path) -> None:
    task = make(task_class("text-ranking"), tiny_bert(tmp_path, num_labels=1))
    none = pa.array([[], []], pa.list_(pa.string()))
    assert run(task, {"query": ["dawn", "night"], "documents": none})["scores"].to_pylist() == [[], []]
    long = features_of(task, {"query": ["dawn"] * 2, "documents": [["river " * 90] * 2, ["a"]]})
    assert long.truncated == 1
    with pytest.raises(ValueError, match="documents is null"):
        features_of(task, {"query": ["dawn"], "documents": [["a", None]]})


@pytest.mark.parametrize("options", [{"top_k": 3}, {"targets": [" the", "river", "nothing"], "top_k": 4}])
@pytest.mark.parametrize("head", ["tied", "apart"])
def test_masks_of_every_number(tmp_path: Path, head: str, options: dict[str, Any]) -> None:
    if head == "tied":
        folder = tiny_roberta(tmp_path, "MaskedLM")
    else:  # a head that transformers does not tell, so that logits of all tokens are made
        tokenizer = wordpiece_tokenizer(64)
        settings = transformers.MobileBertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            embedding_size=32, intra_bottleneck_size=32, max_position_embeddings=64,
            vocab_size=len(tokenizer), initializer_range=0.5,
        )  # fmt: skip
        torch.manual_seed(0)
        folder = save(tmp_path, transformers.MobileBertForMaskedLM(settings), tokenizer)
    oracle = pipeline("fill-mask", folder, device="cpu", tokenizer_kwargs={"truncation": True}, **options)
    oracle.tokenizer.model_max_length = 64
    mask = oracle.tokenizer.mask_token
    texts = [
        " ".join(
            [mask] * (k % 4),
        )
        + f" {text} {mask}"
        for k, text in enumerate(CORPUS[12:24])
    ]
    expected = []
    for text in texts:
        found = oracle(text)
        expected.append((found if isinstance(found[0], list) else [found],))
    assert len({row[0][0][0]["token"] for row in expected}) > 2
    task = make(task_class("fill-mask"), folder, **options)
    assert task.check() == []
    assert bool(task.notes()) == ("targets" in options)
    assert_alike(run(task, {"text": texts}, multiple=8), expected)


def test_faults_of_targets(tmp_path: Path) -> None:
    folder = tiny_bert_for(tmp_path, "MaskedLM")
    (empty,) = make(task_class("fill-mask"), folder, targets=["", " "]).check()
    assert "are not tokens" in empty
    (many,) = make(task_class("fill-mask"), folder, top_k=10_000).check()
    assert "top_k" in many


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("question-answering", "QuestionAnswering"),
        ("token-classification", "TokenClassification"),
        ("zero-shot-classification", "SequenceClassification"),
        ("text-ranking", "SequenceClassification"),
        ("fill-mask", "MaskedLM"),
    ],
)
def test_the_example_of_a_task_runs(tmp_path: Path, name: str, head: str) -> None:
    example = task_class(name).EXAMPLE
    labels = None if "Question" in head else NLI
    task = make(task_class(name), tiny_bert_for(tmp_path, head, id2label=labels), **example.params)
    assert task.check() == []
    found = run(task, example.rows)
    assert len(found) == len(next(iter(example.rows.values())))
    assert found.schema == pa.schema(task.output_fields())

"""Training embedding: losses are those of sentence-transformers, and the vectors are those that are predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses, modules

from hfbatch.errors import SpecError
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.loop.worker_config import shares
from hfbatch.train.plan import make_finetune_plan
from tests.models.text import CORPUS, tiny_bert_encoder
from tests.train.drive import Bench
from tests.train.tools import finetune_here, predicted, run_here, worker_config_of

ANCHORS, POSITIVES, NEGATIVES = CORPUS[0:24:3], CORPUS[1:25:3], CORPUS[30:54:3]
ROWS = {
    "pairs": {"anchor": ANCHORS, "positive": POSITIVES},
    "triplets": {"anchor": ANCHORS, "positive": POSITIVES, "negative": NEGATIVES},
    "scores": {
        "sentence1": ANCHORS,
        "sentence2": POSITIVES,
        "score": [0.9, 0.1, 0.5, 0.5, -0.2, 1.0, 0.0, 0.3],
    },
}
ORACLES = {
    ("pairs", "ranking"): losses.MultipleNegativesRankingLoss,
    ("triplets", "ranking"): losses.MultipleNegativesRankingLoss,
    ("triplets", "triplet"): losses.TripletLoss,
    ("scores", "cosent"): losses.CoSENTLoss,
    ("scores", "cosine"): losses.CosineSimilarityLoss,
}


def bench_of(folder: str, kind: str, size: int = 8, **params: Any) -> Bench:
    return Bench("embedding", folder, ROWS[kind], params=params, batch={"size": size})


@pytest.fixture
def still(tmp_path: Path) -> str:
    """A tiny BERT without dropout."""
    return tiny_bert_encoder(tmp_path / "still", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.mark.parametrize(("kind", "loss"), ORACLES)
def test_loss_and_gradient_are_those_of_sentence_transformers(still: str, kind: str, loss: str) -> None:
    bench = bench_of(still, kind, loss=loss).ready()
    mine = bench.loss(bench.batch())
    mine.backward()
    model = SentenceTransformer(still, device="cpu")
    rows = dict(ROWS[kind])
    labels = torch.tensor(rows.pop("score", [0.0] * 8))
    theirs = ORACLES[kind, loss](model)([model.preprocess(texts) for texts in rows.values()], labels)
    theirs.backward()
    torch.testing.assert_close(mine, theirs)
    gradients = dict(model[0].auto_model.named_parameters())
    for name, weight in bench.model.named_parameters():
        if not name.startswith("pooler"):
            torch.testing.assert_close(
                weight.grad, gradients[name].grad, msg=lambda text, name=name: name + text
            )


def test_the_loss_of_minilm_is_that_of_sentence_transformers(minilm: str) -> None:
    bench = bench_of(minilm, "triplets", loss="triplet").ready()
    model = SentenceTransformer(minilm, device="cpu")
    with torch.no_grad():
        vectors = [model.encode(texts, convert_to_tensor=True) for texts in ROWS["triplets"].values()]
        theirs = losses.TripletLoss(model).compute_loss_from_embeddings(vectors, None)
        torch.testing.assert_close(bench.loss(bench.batch()), theirs)


@pytest.mark.parametrize("kind", ROWS)
def test_a_step_has_the_same_loss_however_it_is_cut_into_groups(still: str, kind: str) -> None:
    bench = bench_of(still, kind, group=4).ready()
    whole = bench.batch()
    items = whole["labels"].numel()
    parts = [bench.loss(bench.batch(*range(start, start + 4)), items) for start in (0, 4)]
    torch.testing.assert_close(sum(parts), bench.loss(whole))


@pytest.mark.parametrize("kind", ROWS)
def test_fillers_are_no_negatives(still: str, kind: str) -> None:
    bench = bench_of(still, kind).ready()
    torch.testing.assert_close(bench.loss(bench.batch(0, 1, 2, -1, -1)), bench.loss(bench.batch(0, 1, 2)))
    nothing = bench.loss(bench.batch(-1, -1), 8)
    nothing.backward()
    assert nothing == 0


def test_a_right_answer_of_another_row_is_no_negative(still: str) -> None:
    anchors, positives = [*ANCHORS[:3], ANCHORS[0]], [POSITIVES[0], POSITIVES[1], POSITIVES[0], POSITIVES[3]]
    bench = Bench("embedding", still, {"anchor": anchors, "positive": positives}, batch={"size": 4}).ready()
    outputs = bench.model(**{name: value for name, value in bench.batch().items() if name != "labels"})
    left, right = torch.nn.functional.normalize(outputs["embedding"], dim=-1).chunk(2)
    scores = 20 * left @ right.T
    for row, document in ((0, 2), (2, 0), (0, 3), (3, 0), (3, 2)):
        scores[row, document] = -torch.inf
    # Rows 0 and 3 have the same anchor, rows 0 and 2 the same positive.
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(4))
    torch.testing.assert_close(bench.loss(bench.batch()), expected)


@pytest.mark.parametrize("kind", ROWS)
def test_training_on_rows_improves_the_metrics(encoder: str, kind: str) -> None:
    bench = bench_of(encoder, kind).ready()
    before = bench.metrics()
    bench.learn()
    after = bench.metrics()
    assert after["loss"] < before["loss"]
    assert before[bench.recipe.metric] < 0.9 < after[bench.recipe.metric]


def test_metrics_are_those_of_sentence_transformers(minilm: str) -> None:
    from sentence_transformers.sentence_transformer import evaluation

    found = bench_of(minilm, "pairs").ready().metrics()
    ids = [str(number) for number in range(8)]
    oracle = evaluation.InformationRetrievalEvaluator(
        dict(zip(ids, ANCHORS, strict=True)),
        dict(zip(ids, POSITIVES, strict=True)),
        {name: {name} for name in ids},
    )(SentenceTransformer(minilm, device="cpu"))
    assert found["mrr_at_10"] == pytest.approx(oracle["cosine_mrr@10"])
    assert found["accuracy_at_1"] == pytest.approx(oracle["cosine_accuracy@1"])


def test_faults_of_rows_name_file_and_row(encoder: str) -> None:
    pairs = {"anchor": ["a", None, "c"], "positive": ["x", "y", ""], "negative": ["x", "z", "z"]}
    assert Bench("embedding", encoder, pairs).validate().faults == [
        "rows.parquet row 1: anchor is null or empty",
        "rows.parquet row 2: positive is null or empty",
        "rows.parquet row 0: negative is the same text as positive",
    ]
    texts = ["a", "b", "c", "d"]
    scores = {"sentence1": texts, "sentence2": texts, "score": [0.5, None, float("nan"), 4.2]}
    assert Bench("embedding", encoder, scores).validate().faults == [
        "rows.parquet row 1: score is null",
        "rows.parquet row 2: score is null",
        "rows.parquet row 3: score is not from -1 to 1; divide scores by the highest, such as 5",
    ]


@pytest.mark.parametrize(
    ("present", "options", "fault"),
    [
        ({"anchor"}, {}, "'positive' is not among the columns"),
        (set(), {}, "'anchor' is not among the columns"),
        ({"sentence1", "sentence2"}, {}, "'score' is not among the columns"),
        ({"anchor", "positive", "score"}, {}, "columns of two kinds at once: 'anchor', 'positive', 'score'"),
        ({"anchor", "positive"}, {"params": {"loss": "triplet"}}, "params.loss 'triplet' is not for pairs; use ranking"),
        ({"anchor", "positive"}, {"batch": {"size": 37}}, "batch.size 37 leaves groups of one row"),
        (
            {"sentence1", "sentence2", "score"},
            {"params": {"query_prompt": "query: "}},
            "params.query_prompt and params.document_prompt are for anchors",
        ),
    ],
)  # fmt: skip
def test_faults_of_columns_are_reported_before_work(
    encoder: str, present: set[str], options: dict[str, Any], fault: str
) -> None:
    faults = Bench("embedding", encoder, {"anchor": []}, **options).recipe.column_faults(present)
    assert fault in faults[0]


def test_faults_of_params_are_reported_before_work(encoder: str) -> None:
    options = {"batch": {"size": 24}, "params": {"group": 16}, "schedule": {"label_smoothing": 0.1}}
    faults = Bench("embedding", encoder, ROWS["pairs"], **options).recipe.check()
    assert "params.group 16 does not divide batch.size 24" in faults[0]
    assert "schedule.label_smoothing: embedding has no labels" in faults[1]


@pytest.mark.parametrize("own", [{}, {"query_prompt": "ask: ", "document_prompt": "text: "}])
def test_modules_and_prompts_of_the_base_go_into_the_folder(
    still: str, tmp_path: Path, own: dict[str, str]
) -> None:
    parts = [
        modules.Transformer(still, max_seq_length=9),
        modules.Pooling(32, pooling_mode=["cls", "mean"]),
        modules.Dense(64, 24),
        modules.Normalize(),
    ]
    prompts = {"query": "seek: ", "plain": "plain: "}
    base = SentenceTransformer(modules=parts, device="cpu", prompts=prompts, default_prompt_name="plain")
    base.save_pretrained(str(tmp_path / "base"))
    bench = bench_of(str(tmp_path / "base"), "pairs", **own).ready()
    out = tmp_path / "out"
    bench.model.save_pretrained(out)
    bench.recipe.processor.save_pretrained(out)
    bench.recipe.complete(out)
    texts = {"anchor": ANCHORS, "positive": POSITIVES}
    encode = {"anchor": SentenceTransformer.encode, "positive": SentenceTransformer.encode}
    if own:
        base.prompts |= {"query": "ask: ", "document": "text: "}
        encode = {"anchor": SentenceTransformer.encode_query, "positive": SentenceTransformer.encode_document}
    with torch.no_grad():
        found = torch.from_numpy(np.stack(bench.recipe.predict(bench.model, bench.batch()).predictions))
    again = SentenceTransformer(str(out), device="cpu")
    for place, name in enumerate(texts):
        expected = encode[name](base, texts[name])
        np.testing.assert_allclose(found[:, place], expected, atol=1e-5)
        np.testing.assert_allclose(encode[name](again, texts[name]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "per_device", "workers", "group", "expected"),
    [
        (64, "auto", 1, 32, (32, 2)),
        (64, "auto", 4, 32, (16, 1)),
        (64, 8, 4, 32, (8, 2)),
        (72, "auto", 2, 24, (12, 3)),
        (128, "auto", 1, 128, (128, 1)),
    ],
)
def test_passes_hold_whole_groups(
    size: int, per_device: int | str, workers: int, group: int, expected: tuple[int, int]
) -> None:
    assert shares(size, per_device, workers, group) == expected


@pytest.mark.parametrize(("loss", "group"), [("auto", 32), ("ranking", 32), ("cosent", 32), ("triplet", 1)])
def test_groups_are_for_losses_that_compare_rows(encoder: str, loss: str, group: int) -> None:
    assert bench_of(encoder, "triplets", size=96, loss=loss).recipe.group == group


def test_a_pass_that_cuts_a_group_is_refused() -> None:
    with pytest.raises(SpecError, match=r"whole groups of 32 .* set batch\.per_device to one of: 16, 32"):
        shares(64, 8, 2, 32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of sentences with the same beginning: 72 to learn from, 41 to measure with."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, rows in (("train", 72), ("dev", 41)):
        numbers = random.permutation(len(CORPUS))[:rows]
        pairs = {
            "anchor": [CORPUS[number] for number in numbers],
            "positive": [CORPUS[number][:-1] + ", they say." for number in numbers],
        }
        (folder / part).mkdir()
        pq.write_table(pa.table(pairs), folder / part / "rows.parquet", row_group_size=30)
    return folder


def spec_of(data: Path, model: str, out: Path, **changes: Any) -> FinetuneSpec:
    values: dict[str, Any] = {
        "task": "embedding",
        "model": model,
        "train": str(data / "train"),
        "eval": str(data / "dev"),
        "output": str(out),
        "schedule": {"epochs": 2, "learning_rate": 5e-3},
        "batch": {"size": 16},
        "compute": {"dtype": "float32"},
        "workers": {"count": 1, "cpus": 1},
        "params": {"pooling": "cls", "normalize": True, "query_prompt": "before: "},
    }
    return FinetuneSpec.build({**values, **changes})


def test_faults_of_the_spec_are_reported_together_before_work(still: str, data: Path, tmp_path: Path) -> None:
    columns = {"sentence1": "anchor", "sentence2": "positive"}
    train = {"path": str(data / "train"), "columns": columns}
    with pytest.raises(SpecError) as caught:
        make_finetune_plan(spec_of(data, still, tmp_path / "out", method="head", train=train))
    first, second = caught.value.faults
    assert first == "method 'head' is not available for embedding; use one of: full, lora, qlora"
    assert second.startswith("columns of two kinds at once: 'anchor', 'positive', 'sentence1', 'sentence2'")


def test_two_workers_train_as_one_does_and_the_folder_gives_the_vectors_of_sentence_transformers(
    still: str, data: Path, tmp_path: Path
) -> None:
    spec = spec_of(data, still, tmp_path / "two", workers={"count": 2, "cpus": 1})
    two = finetune_here(spec)
    assert two.metrics["before"]["mrr_at_10"] < two.metrics["best"]["mrr_at_10"]
    alone = run_here(worker_config_of(spec_of(data, still, tmp_path / "one")), tmp_path)[0]["log"]
    measured = [entry for entry in alone if "eval_loss" in entry]
    for mine, theirs in zip(two.metrics["evaluations"], measured, strict=True):
        assert mine["loss"] == pytest.approx(theirs["eval_loss"], rel=1e-3)
        assert mine["mrr_at_10"] == pytest.approx(theirs["eval_mrr_at_10"], rel=1e-3)
    (mine,), (theirs,) = two.metrics["losses"], [entry for entry in alone if "loss" in entry]
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
    texts = pq.read_table(data / "dev")["anchor"].to_pylist()
    model = SentenceTransformer(two.model, device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    expected = model.encode_query(texts)
    assert not np.allclose(expected, model.encode(texts), atol=1e-3)
    found = predicted(
        "embedding", two.model, data / "dev", tmp_path / "vectors", {"text": "anchor"}, prompt_name="query"
    )
    np.testing.assert_allclose(np.stack(found["embedding"].to_pylist()), expected, atol=1e-4)

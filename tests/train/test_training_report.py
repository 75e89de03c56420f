"""What a fine-tuning leaves: a page, a model card, logs; none of them runs code from rows or shows a secret."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import ModelCard, constants
from typer.testing import CliRunner

import hfbatch
from hfbatch.cli.app import app
from hfbatch.pages import charts
from hfbatch.pages.model_card import model_card
from hfbatch.pages.training import figures, render_report
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.run import FinetuneResult, finetune
from tests.models.text import CORPUS
from tests.train.hub_server import hub_server
from tests.train.tools import finetune_here

EVIL = "<script>alert(1)</script> **not** | a & b"


@pytest.fixture(scope="module")
def trained(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    """A short training with every kind of report, whose texts and labels are markup."""
    folder = tmp_path_factory.mktemp("report")
    texts = [f"{CORPUS[place % len(CORPUS)]} {place}" for place in range(48)] + [EVIL] * 2
    labels = [["<b>yes</b>", "no|"][place % 2] for place in range(50)]
    (folder / "in").mkdir()
    pq.write_table(pa.table({"text": texts, "label": labels}), folder / "in" / "rows.parquet")
    values = {
        "task": "text-classification",
        "model": encoder,
        "train": str(folder / "in"),
        "eval": str(folder / "in"),
        "output": str(folder / "out"),
        "schedule": {"epochs": 2, "learning_rate": 5e-3},
        "batch": {"size": 5},
        "workers": {"count": 1, "cpus": 1},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_verysecret")
        return finetune_here(FinetuneSpec.build(values))


class Page(HTMLParser):
    """Gathers the tags and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_shows_the_figures_of_the_best_checkpoint_and_runs_nothing(trained: FinetuneResult) -> None:
    page = Page((Path(trained.output) / "report.html").read_text())
    assert "script" not in page.tags
    assert "link" not in page.tags
    text = " ".join(page.text)
    assert EVIL in text
    assert f"{trained.metrics['best']['accuracy']:.4g}" in text
    assert page.tags.count("svg") >= 5


def test_the_worst_rows_are_named_with_what_they_hold(trained: FinetuneResult) -> None:
    worst = trained.metrics["details"]["worst"]
    given = pq.read_table(Path(trained.output).parent / "in" / "rows.parquet").to_pylist()
    assert len(worst) == 20
    for one in worst:
        assert one["file"] == "rows.parquet"
        assert one["values"] == given[one["row"]]
        assert one["truth"] == given[one["row"]]["label"]
    confusion = trained.metrics["details"]["confusion"]
    right = sum(confusion["counts"][place][place] for place in range(2))
    assert right / 50 == pytest.approx(trained.metrics["best"]["accuracy"])


def test_throughput_is_measured(trained: FinetuneResult) -> None:
    found = trained.metrics["throughput"]
    assert found["steps"] == 19  # of 20, without the first
    assert found["rows_per_s"] == pytest.approx(5 * 19 / found["seconds"])
    assert 0 <= found["padding"] < 1


def test_the_card_can_be_read_and_gives_data_metrics_and_use(trained: FinetuneResult) -> None:
    card = ModelCard.load(Path(trained.model) / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    results = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert results["accuracy"] == trained.metrics["best"]["accuracy"]
    assert f"with hfbatch {hfbatch.__version__}." in card.text
    for part in (trained.metrics["data"]["digest"], "hfbatch predict text-classification", "| no\\| | 25 |"):
        assert part in card.text
    assert "AutoModelForSequenceClassification.from_pretrained(" in card.text


def test_tensorboard_reads_losses_and_metrics_back(trained: FinetuneResult) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = EventAccumulator(str(Path(trained.output) / "tensorboard"))
    logs.Reload()
    accuracy = {event.step: event.value for event in logs.Scalars("eval/accuracy")}
    reported = {entry["step"]: entry["accuracy"] for entry in trained.metrics["evaluations"]}
    assert accuracy == pytest.approx(reported)
    losses = [event.value for event in logs.Scalars("train/loss")]
    assert losses == pytest.approx([entry["loss"] for entry in trained.metrics["losses"]], rel=1e-5)


def test_status_and_report_speak_of_it(trained: FinetuneResult) -> None:
    call = CliRunner().invoke
    status = json.loads(call(app, ["status", trained.output, "--json"]).stdout)
    assert (status["success"], status["step"], status["steps"]) == (True, 20, 20)
    assert status["best"] == trained.metrics["best"]
    assert "success" in call(app, ["status", trained.output]).stdout
    shown = call(app, ["report", trained.output]).stdout
    best = trained.metrics["best"]
    assert shown.splitlines()[1].split()[0] == "accuracy"
    assert f"{best['accuracy']:.4g}" in shown
    assert f"best at step {best['step']}, took" in shown
    assert "report.html" in shown
    assert json.loads(call(app, ["report", trained.output, "--json"]).stdout) == trained.metrics


def test_no_file_shows_a_secret(trained: FinetuneResult) -> None:
    files = [path for path in Path(trained.output).rglob("*") if path.is_file()]
    assert len(files) > 8
    assert [path for path in files if b"hf_verysecret" in path.read_bytes()] == []


@pytest.mark.parametrize("labels", [0, 40])
def test_a_page_without_or_with_many_labels_is_whole(trained: FinetuneResult, labels: int) -> None:
    metrics = copy.deepcopy(trained.metrics)
    names = [f"label <{number}>" for number in range(labels)]
    counts = [[int(row != column) for column in range(labels)] for row in range(labels)]
    metrics["details"]["confusion"] = {"labels": names, "counts": counts} if labels else None
    metrics["data"]["labels"] = dict.fromkeys(names, 1)
    metrics["throughput"] = {"rows_per_s": None, "tokens_per_s": None}
    text = " ".join(Page(render_report(metrics)).text)
    assert ("label <3>" in text) == bool(labels)
    card = model_card(metrics, "name", "org/name", "AutoModel")
    assert "hfbatch predict text-classification INPUT OUTPUT --model org/name" in card
    metrics["task"], metrics["spec"]["train"]["columns"] = (
        "token-classification",
        {"tokens": "w", "tags": "t"},
    )
    card = model_card(metrics, "name", "org/name", "AutoModel")
    assert "--model org/name --column words=w --param aggregation_strategy=first\n" in card
    metrics["task"], metrics["spec"]["train"]["columns"] = "question-answering", {}
    assert "--model org/name\n" in model_card(metrics, "name", "org/name", "AutoModel")
    metrics["data"]["labels"] = {"answerable": 2, "unanswerable": 1}
    card = model_card(metrics, "name", "org/name", "AutoModel")
    assert "--model org/name --param handle_impossible_answer=true\n" in card


def test_the_python_of_the_card_runs(trained: FinetuneResult) -> None:
    card = (Path(trained.model) / "README.md").read_text()
    names: dict[str, Any] = {}
    exec(card.partition("```python")[2].partition("```")[0], names)
    outputs = names["model"](**names["processor"]("a text", return_tensors="pt"))
    assert outputs.logits.shape == (1, len(trained.metrics["data"]["labels"]))
    card = model_card({**trained.metrics, "task": "embedding"}, "name", "org/name", "AutoModel")
    assert 'SentenceTransformer("org/name")' in card


def test_the_metric_that_decides_comes_first(trained: FinetuneResult) -> None:
    first, second, *_ = figures(trained.metrics)
    assert (first["name"], second["name"]) == ("accuracy", "loss")
    assert first["baseline"] == trained.metrics["baseline"]["accuracy"]
    assert second["baseline"] is None


def test_a_merged_model_has_figures_of_its_own(trained: FinetuneResult) -> None:
    metrics = {**trained.metrics, "merged": {"accuracy": 0.123456, "loss": 1.0}}
    assert "0.1235" in render_report(metrics)
    assert "| 0.1235 |" in model_card(metrics, "name", "org/name", "AutoModel")


def test_charts_escape_their_labels_and_leave_out_what_is_no_number() -> None:
    svg = charts.matrix("confusion", ["<b>", "$x_{$"], [[1, 2], [0, 3]], "t")
    assert "<b>" not in svg
    assert "&lt;b&gt;" in svg
    assert charts.lines("loss", {"a": [(0, float("nan"))]}, "step", "t") == ""
    assert "<path" in charts.lines("loss", {"a": [(0, 1.0), (1, 0.5)]}, "step", "t", ("level", 0.7))


def test_a_finished_training_is_uploaded_once_when_that_is_asked_for(
    trained: FinetuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = FinetuneSpec.build({**trained.metrics["spec"], "push_to_hub": "org/model"})
    with hub_server() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_abc")
        assert finetune(spec, quiet=True).metrics["hub"] == "org/model"
        assert {path.name for path in Path(trained.model).iterdir()} == set(hub.files)
        assert b"--model org/model" in hub.files["README.md"]
        calls = len(hub.calls)
        finetune(spec, quiet=True)
        assert len(hub.calls) == calls

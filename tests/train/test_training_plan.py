"""What a fine-tuning will be, told before it begins: as it then is."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from hfbatch.cli.app import app
from hfbatch.cli.options import finetune_spec
from hfbatch.cluster.session import nodes
from hfbatch.errors import SpecError, SplitError
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.estimate import describe_training, fit_to_sample, try_training
from hfbatch.train.features import validate_rows
from hfbatch.train.loop.memory import held, kept_for_backward, skeleton
from hfbatch.train.loop.model import build_model, trainable
from hfbatch.train.loop.throughput import padding_share
from hfbatch.train.plan import FinetunePlan, make_finetune_plan
from hfbatch.train.run import _with_rows
from tests.cases.every import CASES
from tests.models.text import CORPUS, tiny_bert


@pytest.fixture(scope="module")
def values(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A spec over 90 rows to learn from and 31 to measure with."""
    folder = tmp_path_factory.mktemp("plan")
    for part, rows in (("train", 90), ("dev", 31)):
        texts = [CORPUS[place % len(CORPUS)] for place in range(rows)]
        (folder / part).mkdir()
        table = pa.table({"text": texts, "label": ["no", "yes", "no"] * (rows // 3) + ["no"] * (rows % 3)})
        pq.write_table(table, folder / part / "rows.parquet")
    return {
        "task": "text-classification",
        "model": encoder,
        "train": str(folder / "train"),
        "eval": str(folder / "dev"),
        "output": str(folder / "out"),
        "batch": {"size": 16, "max_length": 12},
        "compute": {"dtype": "float32"},
        "workers": {"count": 1, "cpus": 1},
    }


def plan_of(values: dict[str, Any], **changes: Any) -> FinetunePlan:
    return make_finetune_plan(FinetuneSpec.build({**values, **changes}))


def test_a_label_that_falls_whole_into_the_share_set_aside_is_a_label(
    values: dict[str, Any], tmp_path: Path
) -> None:
    labels = ["rare", *["no", "yes"] * 20]
    pq.write_table(pa.table({"text": CORPUS[:41], "label": labels}), tmp_path / "rows.parquet")
    share = {"train": str(tmp_path / "rows.parquet"), "eval": None, "evaluation": {"fraction": 0.5}}
    trained = set()
    for seed in range(8):
        plan = plan_of(values, **share, seed=seed, params={"class_weights": "balanced"})
        shown, (plan, _) = describe_training(plan), fit_to_sample(plan)
        assert plan.recipe.labels == ["no", "rare", "yes"]
        training_rows = sum(shown["labels"].values())
        assert plan.recipe.weights[1] == (training_rows / 3 if shown["labels"]["rare"] else 1)
        trained.add(shown["labels"]["rare"])
        noted = [note for note in shown["notes"] if "no training row has the label 'rare'" in note]
        assert len(noted) == (not shown["labels"]["rare"])
    assert trained == {0, 1}  # with some seeds the one row is set aside


def test_labels_that_the_model_knows_keep_their_places(values: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_bert(tmp_path, id2label={0: "yes", 1: "no"})
    plan, _ = fit_to_sample(plan_of(values, model=model))
    assert plan.recipe.labels == ["yes", "no"]


def test_the_model_to_begin_with_is_not_in_the_output(values: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(values["model"], tmp_path / "out" / "model")
    with pytest.raises(
        SpecError, match=r"model .* lies in the output .*, where the new model takes its place"
    ):
        make_finetune_plan(
            FinetuneSpec.build(
                {**values, "model": str(tmp_path / "out" / "model"), "output": str(tmp_path / "out")}
            ),
            overwrite=True,
        )


def test_rows_in_both_the_training_and_the_evaluation_set_are_noted(values: dict[str, Any]) -> None:
    assert plan_of(values).notes == plan_of(values, eval=None).notes == []
    (note,) = plan_of(values, eval=values["train"]).notes
    assert note.startswith("eval contains rows of train, from ")
    apart = {"train": {"path": values["train"], "filter": "label = 'no'"}}
    assert plan_of(values, **apart, eval={"path": values["train"], "filter": "label = 'yes'"}).notes == []


def test_rows_that_are_set_aside_make_another_training(values: dict[str, Any]) -> None:
    whole, share = plan_of(values, eval=values["train"]), plan_of(values, eval=None)
    assert whole.fingerprint != share.fingerprint


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            {"dropout": 0.2},
            r"model\.overrides\.dropout is not a field of BertConfig \(has: .*hidden_dropout_prob",
        ),
        (
            {"hidden_dropout_prob": "high"},
            r"no model can be built with model\.overrides .*'high'.*: .*hidden_dropout_prob",
        ),
        (
            {"num_attention_heads": 7},
            r"no model can be built with model\.overrides .*: .*multiple of the number of attention heads",
        ),
    ],
)
def test_overrides_that_the_model_cannot_take_are_refused(
    values: dict[str, Any], overrides: dict[str, Any], fault: str
) -> None:
    with pytest.raises(SpecError, match=fault):
        plan_of(values, model={"name": values["model"], "overrides": overrides})
    plan_of(values, model={"name": values["model"], "overrides": {"hidden_dropout_prob": 0.2}})


def test_a_missing_extra_is_reported(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(
        SpecError, match=r"packages that are missing \(peft, jiwer\); install hfbatch with its extra"
    ):
        plan_of(values)


def test_a_filter_that_fails_on_rows_is_reported_by_its_own_name(
    values: dict[str, Any], ray_cluster: str
) -> None:
    where = {"path": values["eval"], "filter": "CAST(label AS INT) > 3"}
    plan = plan_of(values, eval=where)
    with pytest.raises(
        SplitError, match=r"^eval\.filter 'CAST.*' fails on rows of rows\.parquet: Conversion"
    ):
        validate_rows(plan.spec, plan.model, plan.eval)


def test_rows_that_change_during_training_cost_the_report_no_more_than_their_texts(
    values: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(values["eval"], tmp_path / "dev")
    plan = plan_of(values, eval=str(tmp_path / "dev"))
    worst = {"row": 3, "loss": 1.0, "guess": "no", "truth": "yes"}
    details, notes = _with_rows(plan, {"worst": [worst]})
    assert (details["worst"][0]["values"], notes) == ({"text": CORPUS[3], "label": "no"}, [])
    table = pq.read_table(tmp_path / "dev" / "rows.parquet")
    pq.write_table(table[:5], tmp_path / "dev" / "rows.parquet")
    details, (note,) = _with_rows(plan, {"worst": [worst]})
    assert details["worst"] == []
    assert re.match(r"the rows with the highest loss are not shown: rows\.parquet changed", note)


def test_paths_in_the_rows_are_relative_to_their_folder(values: dict[str, Any], tmp_path: Path) -> None:
    model = CASES["image-classification"].build(tmp_path / "model")
    rows = tmp_path / "rows"
    (rows / "pics").mkdir(parents=True)
    for level in (40, 200):
        Image.new("RGB", (40, 40), (level,) * 3).save(rows / "pics" / f"{level}.png")
    table = pa.table({"image": ["pics/40.png", "pics/200.png"] * 4, "label": ["dark", "light"] * 4})
    pq.write_table(table, rows / "rows.parquet")
    given = {"task": "image-classification", "model": model, "train": str(rows), "eval": str(rows)}
    plan = plan_of({**values, **given, "batch": {"size": 8}})
    assert describe_training(plan)["rows"]["train"]["rows"] == 8


def test_a_flag_names_a_column_whatever_yaml_makes_of_it() -> None:
    given = {"task": "text-classification", "model": "m", "train": "in", "output": "out", "eval": None}
    spec = finetune_spec(given, ["label=yes", "text=1"], None, None, None, None, None)
    assert spec.train.columns == {"label": "yes", "text": "1"}


def test_numbers_of_classes_have_the_names_that_datasets_wrote(
    values: dict[str, Any], tmp_path: Path
) -> None:
    for part, names in (("train", ["World", "Sports"]), ("other", ["Sports", "World"])):
        kinds = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        )
        made = datasets.Dataset.from_dict({"text": CORPUS[:8], "label": [0, 1] * 4}, features=kinds)
        made.to_parquet(str(tmp_path / f"{part}.parquet"))
    rows = {name: str(tmp_path / f"{name}.parquet") for name in ("train", "other")}
    plan = plan_of(values, train=rows["train"], eval=rows["train"])
    assert (plan.recipe.params.label_names, plan.spec.params) == (
        ("World", "Sports"),
        {"label_names": ("World", "Sports")},
    )
    assert plan_of(values, train=rows["train"], eval=rows["train"]).fingerprint == plan.fingerprint
    with pytest.raises(
        SpecError, match=r"different names for the classes of 'label': .* as params\.label_names"
    ):
        plan_of(values, train=rows["train"], eval=rows["other"])
    mine = {"label_names": ["a", "b"]}
    assert plan_of(values, train=rows["train"], eval=rows["other"], params=mine).spec.params == mine
    assert plan_of(values).spec.params == {}


def test_the_evaluation_set_has_the_columns_of_the_training_set(
    values: dict[str, Any], tmp_path: Path
) -> None:
    texts = CORPUS[:8]
    tables = {
        "whole": {"text": texts, "label": [0, 1] * 4},
        "floats": {"text": texts, "label": [0.0, 1.0] * 4},
        "pairs": {"text": texts, "text_pair": texts, "label": [0, 1] * 4},
    }
    for name, table in tables.items():
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    rows = {name: str(tmp_path / f"{name}.parquet") for name in tables}
    with pytest.raises(SpecError) as caught:
        plan_of(values, train=rows["whole"], eval=rows["floats"])
    assert caught.value.faults == [
        "label is int64 in train (single) but double in eval (regression); make them the same, or set params.kind"
    ]
    assert plan_of(values, train=rows["whole"], eval=rows["floats"], params={"kind": "single"})
    pair = {"path": rows["pairs"], "columns": {"text_pair": "text_pair"}}
    with pytest.raises(SpecError, match="train has 'text_pair' and the other has not"):
        plan_of(values, train=pair, eval=rows["whole"])


def test_a_metric_may_have_the_name_that_transformers_gives_it(values: dict[str, Any]) -> None:
    assert plan_of(values, evaluation={"metric": "eval_loss"}).spec.evaluation.metric == "loss"


def test_faults_of_files_have_the_names_of_this_spec(values: dict[str, Any]) -> None:
    measured = {"path": values["eval"], "filter": "size > 3"}
    with pytest.raises(SpecError) as caught:
        plan_of(values, train=f"{values['train']}/input.parquet", eval=measured)
    missing, unknown = caught.value.faults
    assert missing.startswith(f"train.path {values['train']}/input.parquet does not exist")
    assert unknown.startswith("eval.filter 'size > 3'")
    with pytest.raises(SpecError) as caught:
        plan_of(values, eval={"path": values["eval"], "columns": {"text": "body"}}, output=values["train"])
    assert caught.value.faults == [
        "column 'body' not in eval (has: text, label), which eval.columns names for 'text'",
        f"output {values['train']} lies in the folder of train.path, where the next run would read it; "
        "choose a folder outside",
    ]
    for part in ("train", "eval"):
        with pytest.raises(
            SpecError, match=rf"lies in the folder of {part}\.path, where the next run would read"
        ):
            plan_of(values, **{part: f"{values[part]}/*"}, output=f"{values[part]}/out")
    with pytest.raises(SpecError) as caught:
        FinetuneSpec.build({**values, "schedule": {"learning_rate": "fast"}})
    (several,) = caught.value.faults
    assert several.startswith("schedule.learning_rate: ")
    assert several.endswith("or 'auto' (got 'fast')")


def test_rows_steps_and_lengths_are_those_of_the_data(values: dict[str, Any]) -> None:
    shown = describe_training(plan_of(values))
    assert shown["rows"] == {"train": {"rows": 90, "exact": True}, "eval": {"rows": 31, "exact": True}}
    assert shown["labels"] == {"no": 60, "yes": 30}
    assert (shown["steps"], shown["epochs"]) == (18, 3.0)  # 6 steps an epoch, the last one of 10 rows
    assert shown["batch"] == {"size": 16, "per_device": 16, "accumulation": 1, "workers": 1}
    assert shown["lengths"]["max"] == 12
    assert 0 < shown["lengths"]["truncated"] <= 1
    assert json.loads(json.dumps(shown)) == shown
    assert not Path(values["output"]).exists()


def test_steps_of_the_spec_go_before_epochs(values: dict[str, Any]) -> None:
    shown = describe_training(plan_of(values, schedule={"steps": 9}))
    assert (shown["steps"], shown["epochs"]) == (9, 1.5)


@pytest.mark.parametrize("method", ["full", "head"])
def test_weights_are_counted_without_loading_them(values: dict[str, Any], method: str) -> None:
    plan, _ = fit_to_sample(plan_of(values, method=method))
    shown = describe_training(plan)
    changing, weights = trainable(build_model(plan.spec, plan.recipe))
    assert (shown["trainable"], shown["weights"]) == (changing, weights)
    assert (changing == weights) == (method == "full")


def test_what_a_pass_keeps_is_counted_exactly() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.ReLU(), torch.nn.Linear(20, 1))
    kept = kept_for_backward(model, lambda: model(torch.zeros(4, 10)).sum())
    assert kept == 4 * (
        4 * 10 + 4 * 20
    )  # the input, and what ReLU gives: the second layer's input is the same


def test_a_model_without_weights_keeps_about_what_the_real_one_does(values: dict[str, Any]) -> None:
    plan, _ = fit_to_sample(plan_of(values))
    estimate = describe_training(plan)["memory"]["activations"]
    model = build_model(plan.spec, plan.recipe)
    inputs = {"input_ids": torch.ones(16, 12, dtype=torch.long), "attention_mask": torch.ones(16, 12).long()}
    real = kept_for_backward(model, lambda: model(**inputs).logits.sum())
    assert estimate == pytest.approx(real, rel=0.05)
    again = plan_of(values, compute={"dtype": "float32", "gradient_checkpointing": True})
    assert describe_training(again)["memory"]["activations"] < estimate / 2
    assert next(skeleton(plan.spec, plan.recipe).parameters()).is_meta


@pytest.mark.parametrize(
    ("changes", "bytes_of"),
    [
        ({}, (4000, 4000, 8000)),
        ({"schedule": {"optimizer": "adamw_8bit"}}, (4000, 4000, 2000)),
        ({"method": "lora"}, (4000, 400, 800)),
        ({"method": "qlora"}, (450 + 400, 400, 800)),
        ({"workers": {"count": 2, "strategy": "fsdp"}}, (2000, 2000, 4000)),
    ],
)
def test_memory_goes_by_method_and_optimizer(
    values: dict[str, Any], changes: dict[str, Any], bytes_of: tuple[int, int, int]
) -> None:
    spec = FinetuneSpec.build({**values, **changes})
    changing = 100 if "method" in changes else 1000
    found = held(spec, 1000, changing, 50, 2)
    assert (found["weights"], found["gradients"], found["optimizer"]) == bytes_of
    assert found["total"] == sum(bytes_of) + 50
    assert held(spec, 1000, changing, None, 2)["total"] is None


def test_faults_of_rows_and_of_the_metric_are_reported(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"evaluation.metric 'bleu' is none of: accuracy, "):
        describe_training(plan_of(values, evaluation={"metric": "bleu"}))
    pq.write_table(pa.table({"text": ["a", None], "label": ["x", "x"]}), tmp_path / "rows.parquet")
    with pytest.raises(SpecError) as caught:
        describe_training(plan_of(values, train=str(tmp_path)))
    assert "train: rows.parquet row 1: text is null or empty" in caught.value.faults
    assert any("same label 'x'" in fault for fault in caught.value.faults)
    lines = [json.dumps({"text": text, "label": "xy"[at % 2]}) for at, text in enumerate(CORPUS[:20])]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, "null", '{"text": 5, "label": "x"}']))
    with pytest.raises(SpecError) as caught:
        describe_training(plan_of(values, train=str(tmp_path / "rows.jsonl")))
    unreadable, other = caught.value.faults[:2]
    assert unreadable == "train: rows.jsonl row 20: the line holds null, not a JSON object"
    assert "rows.jsonl row 21: column 'text' is string, but the row has the number 5" in other
    assert "train.types: {text: string}" in other


def test_of_many_splits_a_few_are_looked_at(values: dict[str, Any]) -> None:
    train = {"path": values["train"], "split_rows": 5}
    shown = describe_training(plan_of(values, train=train))
    assert shown["rows"]["train"] == {"rows": 90, "exact": False}
    assert sum(shown["labels"].values()) < 90
    assert "estimates from a few splits" in shown["notes"][-1]


def test_a_trial_estimates_the_time(values: dict[str, Any], ray_cluster: str) -> None:
    plan = plan_of(values, batch={"size": 16, "per_device": 8, "max_length": 12})
    shown = try_training(plan, nodes())
    trial = shown["trial"]
    assert shown["rows"]["train"] == {"rows": 90, "exact": True}
    assert shown["batch"] == {"size": 16, "per_device": 8, "accumulation": 2, "workers": 1}
    assert trial["rows_per_s"] == pytest.approx(16 / trial["seconds_per_step"])
    assert trial["evaluations"] == 4
    work = trial["eta_s"] - trial["load_seconds"]
    assert work == pytest.approx(18 * trial["seconds_per_step"] + 4 * 31 / trial["eval_rows_per_s"])
    without = describe_training(plan)
    assert shown["memory"]["activations"] == pytest.approx(without["memory"]["activations"], rel=0.05)
    assert not Path(values["output"]).exists()


def test_plan_and_dry_run_speak_to_people_and_machines(values: dict[str, Any], tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(values))
    call = CliRunner().invoke
    for command in (["plan", str(spec), "--no-trial"], ["run", str(spec), "--dry-run"]):
        assert json.loads(call(app, [*command, "--json"]).stdout)["steps"] == 18
    flags = ["-m", values["model"], "--eval", values["eval"], "--dry-run"]
    shown = call(app, ["finetune", values["task"], values["train"], values["output"], *flags]).stdout
    for part in ("90 train, 31 eval", "no 60, yes 30", "weights", "an estimate"):
        assert part in " ".join(shown.split())
    refused = call(app, ["run", str(spec), "--keep", "text"])
    assert refused.exit_code == 2
    assert not Path(values["output"]).exists()


def test_padding_is_what_is_computed_beyond_the_rows() -> None:
    assert padding_share(np.array([4, 4, 4, 4]), 2, 2, 0, True) == 0
    assert padding_share(np.array([1, 3]), 2, 2, 0, True) == pytest.approx(1 - 4 / 6)
    assert padding_share(np.array([1, 3]), 2, 1, 0, True) == 0
    # the last step is filled up, and what fills it is padding
    assert padding_share(np.array([2, 2, 2]), 2, 2, 0, False) == pytest.approx(1 - 6 / 8)

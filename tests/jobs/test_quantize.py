"""`hfbatch quantize`: the folder holds the quantised model, its card what it costs, and a job reads it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from hfbatch import JobSpec
from hfbatch.cli.app import app
from hfbatch.engines.base import EngineConfig
from hfbatch.engines.torch import TorchEngine
from tests.jobs.here import job_here
from tests.jobs.tools import make_spec, read_output, sentences
from tests.models.late import tiny_colbert


@pytest.fixture
def rows(tmp_path: Path) -> str:
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table({"id": range(24), "text": sentences(24)}), tmp_path / "rows" / "rows.parquet")
    return str(tmp_path / "rows")


@pytest.mark.parametrize("to", ["int8", "nf4", "int8_weight_only"])
def test_a_folder_gives_what_the_job_gives_that_quantises(
    classifier: str, rows: str, tmp_path: Path, to: str
) -> None:
    out = tmp_path / "model"
    flags = [
        "--to",
        to,
        "--rows",
        rows,
        "--json",
        "--set",
        "model.dtype=float32",
        "--set",
        "engine.guard.limits={agreement: 0, score_change_mean: 9}",
    ]
    done = CliRunner().invoke(app, ["quantize", classifier, str(out), *flags])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["out"], found["quantization"], found["guard"]["status"]) == (str(out), to, "passed")
    assert 0 < found["bytes"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    card = (out / "README.md").read_text()
    assert all(word in card for word in ("base_model:", to, found["guard"]["summary"], "score_change_mean"))
    values = {"task": "text-classification", "input": rows, "batch": {"size": 8}}
    tables = []
    for name, model, engine in (
        ("asked", classifier, {"name": "torch", "quantization": to, "guard": "skip"}), ("kept", str(out), "torch"),
    ):  # fmt: skip
        target = tmp_path / name
        spec = {
            **values,
            "model": {"name": model, "dtype": "float32"},
            "engine": engine,
            "output": str(target),
        }
        result = job_here(JobSpec.build(spec))
        assert result.exit_code == 0, result.message
        tables.append(read_output(target))
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize(
    ("engine", "precisions"), [("openvino", ("int8", "none")), ("onnx", ("int8",))], ids=["openvino", "onnx"]
)
def test_a_graph_gives_what_the_job_gives_that_exports_it(
    short_minilm: str, rows: str, tmp_path: Path, engine: str, precisions: tuple[str, ...]
) -> None:
    """Bit for bit; in 8 bits and in float32, which is the graph that the one in 8 bits is made from."""
    for to in precisions:
        out = tmp_path / to
        flags = ["--to", to, "--engine", engine, "--rows", rows, "--json", "--task", "embedding"]
        limits = "engine.guard.limits={cosine_mean: 0, cosine_min: -1}"
        done = CliRunner().invoke(app, ["quantize", short_minilm, str(out), *flags, "--set", limits])
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert (found["engine"], found["quantization"]) == (engine, to)
        assert (found["guard"] is None) == (to == "none")
        graphs = [*out.glob("openvino_model.*"), *out.glob("model.onnx*"), *out.glob("export.json")]
        assert found["bytes"] == sum(file.stat().st_size for file in graphs)
        assert not [*out.rglob("*.safetensors")]
        card = (out / "README.md").read_text()
        summary = found["guard"]["summary"] if found["guard"] else "within a thousandth"
        assert all(word in card for word in (f"A graph for {engine}", summary, f"{to} --set engine={engine}"))
        asked = {"name": engine, "quantization": to, "guard": "skip"}
        tables = []
        for model, section in ((short_minilm, asked), (str(out), {"name": engine})):
            target = tmp_path / f"{to}-{len(tables)}"
            spec = make_spec("embedding", model, rows, target, engine=section)
            result = job_here(spec)
            assert result.exit_code == 0, result.message
            tables.append(read_output(target))
        assert tables[0].equals(tables[1])
    done = CliRunner().invoke(app, ["quantize", str(out), str(tmp_path / "again"), *flags])
    assert f"is a graph already, which engine {engine} runs as it is" in " ".join(done.stderr.split())


def test_a_checkpoint_whose_projection_would_be_lost_is_refused(rows: str, tmp_path: Path) -> None:
    folder = tiny_colbert(tmp_path / "colbert")
    flags = ["--to", "int8", "--rows", rows, "--task", "multi-vector-embedding"]
    done = CliRunner().invoke(app, ["quantize", folder, str(tmp_path / "out"), *flags])
    assert "a written model would lack it" in " ".join(done.stderr.split())


def test_a_quantisation_that_does_harm_is_not_written(classifier: str, rows: str, tmp_path: Path) -> None:
    """A model with an outlier in each row of its weights: 8 bits leave nothing of the others."""
    folder = tmp_path / "outliers"
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    with torch.no_grad():
        for layer in model.base_model.encoder.layer:
            for part in (layer.intermediate.dense, layer.output.dense, layer.attention.self.value):
                part.weight[:, 0] = 300.0
    model.save_pretrained(folder)
    for file in Path(classifier).glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    out = tmp_path / "model"
    flags = ["--to", "int8_dynamic", "--rows", rows, "--json", "--set", "model.dtype=float32"]
    done = CliRunner().invoke(app, ["quantize", str(folder), str(out), *flags])
    assert done.exit_code == 1
    shown = " ".join(done.stderr.split())
    assert "differs too much from float32" in shown
    assert "Set engine.quantization=none" in shown
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".model")] == []


def test_the_layers_of_the_pooling_are_copied(classifier: str, rows: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "model"
    shutil.copytree(classifier, source)
    for inner in ("2_Dense", "checkpoint-3", "onnx"):
        (source / inner).mkdir()
        save_file({"linear.weight": torch.ones(2, 2)}, source / inner / "model.safetensors")
    for name in ("model.onnx", "model.onnx_data"):
        (source / "onnx" / name).write_bytes(b"of another export")
    flags = ["--to", "int8_weight_only", "--rows", rows, "--json", "--set", "engine.guard=skip"]
    done = CliRunner().invoke(app, ["quantize", str(source), str(out), *flags])
    assert done.exit_code == 0, done.output
    assert [path.parent.name for path in out.glob("*/model.*")] == ["2_Dense"]


def test_added_tokens_are_written_and_the_card_escapes_the_name_of_the_folder(
    classifier: str, rows: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "a`b](c)<i>|d", tmp_path / "out `x`"
    shutil.copytree(classifier, source)
    (source / "added_tokens.json").write_text(
        "{}"
    )  # of another version: it would be read beside the new file
    flags = ["--to", "int8_weight_only", "--rows", rows, "--json", "--set", "engine.guard=skip"]
    flags += ["--set", "tokenizer.add_tokens=[zorkmid]", "--set", "tokenizer.truncation_side=left"]
    done = CliRunner().invoke(app, ["quantize", str(source), str(out), *flags])
    assert done.exit_code == 0, done.output
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "# a\\`b\\]\\(c\\)&lt;i&gt;\\|d in int8_weight_only" in card
    assert "--model 'out `x`'" in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == source.name
    assert not (out / "added_tokens.json").exists()
    tokenizer, model = (
        AutoTokenizer.from_pretrained(out),
        TorchEngine(EngineConfig(str(out), "AutoModelForSequenceClassification", "float32")).model,
    )
    assert tokenizer.tokenize("zorkmid") == ["zorkmid"]
    assert tokenizer.truncation_side == "left"
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_other_weights_and_links_to_folders_above_are_not_copied(
    classifier: str, rows: str, tmp_path: Path
) -> None:
    folder, out = tmp_path / "folder", tmp_path / "model"
    shutil.copytree(classifier, folder)
    for name in ("original/consolidated.00.pth", "onnx/model.onnx_data", "2_Dense/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "loop").symlink_to(folder)
    flags = ["--to", "int8_weight_only", "--rows", rows, "--set", "engine.guard=skip"]
    before = os.umask(0o027)
    try:
        done = CliRunner().invoke(app, ["quantize", str(folder), str(out), *flags])
    finally:
        os.umask(before)
    assert done.exit_code == 0, done.output
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "2_Dense/config.json",
    }  # fmt: skip
    assert out.stat().st_mode & 0o777 == 0o750


def test_rows_of_which_none_can_be_compared_are_refused(classifier: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([None] * 4, pa.string())}), tmp_path / "rows.parquet")
    flags = ["--to", "int8", "--rows", str(tmp_path / "rows.parquet")]
    done = CliRunner().invoke(app, ["quantize", classifier, str(tmp_path / "m"), *flags])
    assert done.exit_code == 2
    assert "none of the first 4 rows can be compared: text is null" in " ".join(done.stderr.split())
    assert not (tmp_path / "m").exists()


def test_what_cannot_be_written_is_refused(classifier: str, rows: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for given, fault in (
        (
            [classifier, "s3://bucket/m", "--to", "int8"],
            "s3://bucket/m is a URL; give a folder of this machine",
        ),
        ([classifier, str(tmp_path / "link"), "--to", "int8"], "exists; choose another folder"),
        ([classifier, rows, "--to", "int8"], "exists; choose another folder"),
        (
            [classifier, str(tmp_path / "m"), "--to", "gptq"],
            "engine.quantization: Input should be 'none', 'int8'",
        ),
        ([classifier, str(tmp_path / "m"), "--to", "none"], "names no quantisation"),
        (
            [classifier, str(tmp_path / "m"), "--to", "nf4", "--engine", "onnx"],
            "engine.quantization: Input should be 'none' or 'int8'",
        ),
        (
            [classifier, str(tmp_path / "m"), "--to", "none", "--engine", "continuous"],
            "use engine torch or openvino or onnx",
        ),
        (
            [
                classifier,
                str(tmp_path / "m"),
                "--to",
                "none",
                "--engine",
                "onnx",
                "--set",
                "tokenizer.add_tokens=[a]",
            ],
            "leave changes out",
        ),
    ):
        done = CliRunner().invoke(app, ["quantize", *given, "--rows", rows])
        assert done.exit_code == 2
        assert fault in " ".join(done.stderr.split())
    assert TorchEngine(EngineConfig(classifier, "AutoModel", "float32")).dtype == "float32"  # still whole

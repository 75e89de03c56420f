"""Models in GGUF files: what is refused, and that a job gives what transformers gives for the file itself."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hfbatch.engines.gguf import as_folder
from hfbatch.errors import SpecError, WorkerError
from hfbatch.hub.gguf_header import check_header
from hfbatch.hub.models import Model, pin
from hfbatch.predict.plan import make_plan
from hfbatch.runtime.checks import readable
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.spec.job import JobSpec, ModelSpec
from hfbatch.train.plan import make_finetune_plan
from tests.jobs.here import job_here
from tests.models.gguf import tiny_gguf
from tests.models.text import CHAT_TEMPLATE, CORPUS

FILES = {"F32": "tiny.F32.gguf", "Q8_0": "tiny.Q8_0.gguf"}
GREEDY = {"max_new_tokens": 12, "do_sample": False}
CHATS = [[{"role": "user", "content": text}] for text in CORPUS[:5]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two GGUF files and nothing else; the model that they were made from is beside it."""
    folder = tmp_path_factory.mktemp("gguf") / "files"
    folder.mkdir()
    for kind, file in FILES.items():
        tiny_gguf(folder / file, folder.parent / "original", kind)
    return folder


def of_file(folder: Path, file: str) -> tuple[Any, Any]:
    """Model and tokenizer as transformers reads them from the file."""
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)


def answers(model: Any, tokenizer: Any, chats: list[Any], options: dict[str, Any]) -> list[str]:
    """What greedy decoding gives for each chat alone."""
    found = []
    for chat in chats:
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        found.append(tokenizer.decode(made, skip_special_tokens=True))
    return found


def job_of(name: Path, file: str, tmp_path: Path, engine: str = "torch", **params: Any) -> JobSpec:
    rows = tmp_path / "rows.parquet"
    if not rows.exists():
        pq.write_table(pa.table({"messages": CHATS}), rows)
    return JobSpec.build(
        {
            "task": "auto",
            "model": {"name": str(name), "file": file, "dtype": "float32"},
            "input": str(rows),
            "output": str(tmp_path / f"out-{engine}"),
            "engine": engine,
            "params": {**GREEDY, "return_full_text": False, **params},
        }
    )


def test_a_file_that_was_not_downloaded_to_its_end_is_refused(folder: Path, tmp_path: Path) -> None:
    whole = (folder / FILES["F32"]).read_bytes()
    (tmp_path / "part.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        SpecError, match=r"part\.gguf cannot be read.*; if it is incomplete, download it again"
    ):
        readable(pin(ModelSpec(name=str(tmp_path), file="part.gguf")))


@pytest.mark.parametrize("kind", FILES)
def test_the_folder_holds_what_transformers_reads_from_the_file(folder: Path, kind: str) -> None:
    expected, tokenizer = of_file(folder, FILES[kind])
    made = as_folder(pin(ModelSpec(name=str(folder), file=FILES[kind])))
    model, loading = AutoModelForCausalLM.from_pretrained(
        made.folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    original = AutoModelForCausalLM.from_pretrained(folder.parent / "original")
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True)]
    assert all(same) == (kind == "F32")
    again = AutoTokenizer.from_pretrained(made.folder)
    for text in (*CORPUS, "<|user|>ünï 🙂</s>", ""):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == CHAT_TEMPLATE
    assert again.eos_token == tokenizer.eos_token == "</s>"
    assert GenerationConfig.from_pretrained(made.folder).eos_token_id == 2
    assert "quantization_config" not in json.loads(Path(made.folder, "config.json").read_text())


def test_a_file_is_read_once(folder: Path) -> None:
    model = pin(ModelSpec(name=str(folder), file=FILES["F32"]))
    plan, first = as_folder(model, weights=False), as_folder(model)
    assert not list(Path(plan.folder).glob("*.safetensors"))
    written = Path(first.folder, "model.safetensors").stat()
    assert as_folder(model) == as_folder(plan) == first
    assert Path(first.folder, "model.safetensors").stat() == written


@pytest.mark.parametrize("engine", ["torch", "continuous"])
@pytest.mark.parametrize("kind", FILES)
def test_a_job_generates_what_transformers_does_from_the_file(
    folder: Path, tmp_path: Path, kind: str, engine: str
) -> None:
    spec = job_of(folder, FILES[kind], tmp_path, engine)
    job_here(spec)
    (part,) = Path(spec.output.path).glob("part-*.parquet")
    expected = answers(*of_file(folder, FILES[kind]), CHATS, GREEDY)
    assert len({*expected}) > 1
    assert pq.read_table(part)["generated_text"].to_pylist() == expected
    job = json.loads(Path(spec.output.path, "__hfbatch", "job.json").read_text())
    assert job["settled"]["dtype"] == "float32"
    assert job["spec"]["model"]["file"] == FILES[kind]
    assert job["spec"]["task"] == "text-generation"  # of the architecture in the file


def test_another_content_is_another_job(folder: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    shutil.copy(folder / FILES["F32"], files / "a.gguf")
    job_here(job_of(files, "a.gguf", tmp_path))
    shutil.copy(files / "a.gguf", files / "b.gguf")
    assert make_plan(job_of(files, "b.gguf", tmp_path)).todo == []  # the same content
    shutil.copy(folder / FILES["Q8_0"], files / "a.gguf")
    with pytest.raises(SpecError, match="holds the parts of another job"):
        make_plan(job_of(files, "a.gguf", tmp_path))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (None, "has its weights in GGUF files; name one of them: model.file: cut.gguf or empty.gguf or "),
        ("none.gguf", "has no GGUF file 'none.gguf'; it has: cut.gguf, empty.gguf, pointer.gguf, tiny-"),
        ("../files/empty.gguf", "has no GGUF file '../files/empty.gguf'"),
        (
            "empty.gguf",
            "empty.gguf cannot be read: it is not a GGUF file; if it is incomplete, download it again",
        ),
        ("cut.gguf", "cut.gguf cannot be read: its header claims 2 numbers, and 0 bytes follow; if it is"),
        ("pointer.gguf", "pointer.gguf is a Git LFS pointer in place of the file"),
        ("tiny-00001-of-00002.gguf", "is one of 2 files of a model, which transformers does not read; join"),
    ],
)
def test_a_file_that_is_not_there_or_not_gguf_is_a_fault(
    tmp_path: Path, file: str | None, message: str
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for name, content in {
        "cut.gguf": b"GGUF\x03\x00\x00\x00",
        "empty.gguf": b"",
        "pointer.gguf": b"version https://git-lfs.github.com/spec/v1\n",
        "tiny-00001-of-00002.gguf": b"GGUF",
    }.items():
        (files / name).write_bytes(content)
    with pytest.raises(SpecError) as caught:
        pin(ModelSpec(name=str(files), file=file))
    (fault,) = caught.value.faults
    assert message in fault


HEAD = b"GGUF" + struct.pack("<I", 3)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def tensor(*shape: int) -> bytes:
    return struct.pack(f"<QI{len(shape)}QIQ", 0, len(shape), *shape, 0, 0)


LLAMA = key(b"general.architecture", 8, struct.pack("<Q5s", 5, b"llama"))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (HEAD + struct.pack("<QQ", 1 << 60, 0), "its header claims 1,152,921,504,606,846,976 tensors, and 0 bytes"),
        (HEAD + struct.pack("<QQ", 0, 1 << 60), "its header claims 1,152,921,504,606,846,976 keys, and 0 bytes"),
        (HEAD + struct.pack("<QQ", 0, 1) + key(b"a", 9, struct.pack("<IQ", 8, 1 << 60)), "976 values, and 0 bytes"),
        (HEAD + struct.pack("<QQ", 0, 1) + key(b"a", 9, struct.pack("<IQ", 4, 1 << 60)), "976 numbers, and 0 bytes"),
        (HEAD + struct.pack("<QQ", 0, 1) + key(b"a", 8, struct.pack("<Q", 1 << 60)), "976 characters, and 0 bytes"),
        (HEAD + struct.pack("<QQ", 0, 1) + key(b"a", 99, b"\0" * 9), "a value of an unknown type 99"),
        (HEAD + struct.pack("<QQ", 1, 0) + tensor(1 << 20, 1 << 20), "(1048576, 1048576), for which it is too small"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 of the format, and transformers reads 2 and 3"),
        (HEAD + struct.pack("<QQ", 1, 2) + LLAMA + key(b"llama.block_count", 4, struct.pack("<I", 1 << 24)) + tensor(64),
         "its header has llama.block_count 16,777,216, and it has 1 tensors"),
        (HEAD + struct.pack("<QQ", 1, 2) + LLAMA + key(b"llama.embedding_length", 4, struct.pack("<I", 128)) + tensor(64),
         "its header has llama.embedding_length 128, and the largest dimension of its tensors is 64"),
        (HEAD + struct.pack("<QQ", 1, 2) + LLAMA
         + key(b"llama.attention.head_count", 9, struct.pack("<IQII", 4, 2, 4, 99)) + tensor(64),
         "its header has llama.attention.head_count 99, and the largest dimension"),
    ],
)  # fmt: skip
def test_a_header_that_claims_more_than_the_file_holds_is_refused(
    tmp_path: Path, header: bytes, message: str
) -> None:
    """At once: to read, or build, what it claims would take hours."""
    (tmp_path / "a.gguf").write_bytes(header)
    with pytest.raises(SpecError) as caught:
        pin(ModelSpec(name=str(tmp_path), file="a.gguf"))
    assert message in str(caught.value)


def test_a_header_of_the_other_byte_order_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    check_header(tmp_path / "a.gguf")


def test_other_mistakes_are_faults(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"is a file; give model.name='.*' and model.file='tiny.F32.gguf'"):
        pin(ModelSpec(name=str(folder / FILES["F32"])))
    with pytest.raises(SpecError, match=r"it has no GGUF files: leave model.file out"):
        pin(ModelSpec(name=str(folder.parent / "original"), file="a.gguf"))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(SpecError, match=r"model.file: cut\.gguf cannot be read"):
        make_plan(job_of(tmp_path, "cut.gguf", tmp_path))
    training = {"task": "text-generation", "train": str(tmp_path), "output": str(tmp_path / "out")}
    model = {"name": str(folder), "file": FILES["F32"]}
    with pytest.raises(SpecError, match="a GGUF file holds rounded weights and is not fine-tuned"):
        make_finetune_plan(FinetuneSpec.build({**training, "model": model}))


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfbatch.engines.gguf.find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"model.file needs gguf; pip install 'hfbatch\[quantization\]'"):
        as_folder(pin(ModelSpec(name=str(folder), file=FILES["F32"])))


def test_a_file_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path / "a.gguf", tmp_path / "original", without="blk.1.ffn_up")
    model = pin(ModelSpec(name=str(tmp_path), file=file))
    with pytest.raises(
        WorkerError, match=r"a.gguf lacks 1 weights of LlamaForCausalLM, such as model.layers.1"
    ):
        as_folder(model)


def test_a_file_of_the_hub_is_found_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, repository = "1" * 40, tmp_path / "models--org--tiny-gguf"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    models = [pin(ModelSpec(name="org/tiny-gguf", file=file)) for file in FILES.values()]
    assert [model.commit for model in models] == [commit] * 2
    assert len({model.version for model in models}) == 2
    for model in models:
        there = Model(**{**vars(model), "source": "/elsewhere"}).fetch()  # as on another machine
        assert Path(there.source) == repository / "snapshots" / commit
        assert as_folder(there).size()[0] > 0
    with pytest.raises(SpecError, match=r"has no GGUF file 'x.gguf'"):
        pin(ModelSpec(name="org/tiny-gguf", file="x.gguf"))

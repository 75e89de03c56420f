"""Packed batches: rows without padding between them give what each of them gives alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, MPNetConfig, MPNetModel

from hfbatch.engines.base import PACKED, EngineConfig
from hfbatch.engines.packed import attend, pack_batches
from hfbatch.engines.torch import TorchEngine
from hfbatch.errors import SpecError
from hfbatch.predict.plan import make_plan
from hfbatch.runtime.predictor import Predictor
from hfbatch.serve.endpoint import Endpoint
from hfbatch.serve.plan import EndpointConfig
from hfbatch.serve.plan import make_plan as plan_endpoint
from hfbatch.spec.engines import TorchEngineSpec
from hfbatch.spec.job import ServeSpec
from hfbatch.tasks.base import Task
from hfbatch.tasks.multimodal.embedding import Embedding
from hfbatch.tasks.text.question_answering import QuestionAnswering
from hfbatch.tasks.text.text_classification import TextClassification
from hfbatch.tasks.text.token_classification import TokenClassification
from tests.jobs.here import job_here
from tests.jobs.tools import make_spec, read_output, sentences, write_shards
from tests.models.late import tiny_pylate
from tests.models.text import save, tiny_bert_encoder, tiny_bert_for, tiny_llama, wordpiece_tokenizer
from tests.tasks.drive import features_of, make

SIZES = {
    **{"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 64, "max_position_embeddings": 24},
    **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
}
GROUPS = {"num_key_value_heads": 2}
OWN: dict[str, dict[str, Any]] = {
    "modernbert": {
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "cls_token_id": 0,
        "sep_token_id": 2,
    },
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "gemma": {"head_dim": 8, **GROUPS},
    "gemma3_text": {
        **{"head_dim": 8, "sliding_window": 6, "use_bidirectional_attention": True, **GROUPS},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "llama": GROUPS,
    "mistral": {"sliding_window": 6, **GROUPS},
    "phi3": {"sliding_window": 6},
    "qwen2": GROUPS,
    "qwen3": {"head_dim": 8, **GROUPS},
}
LENGTHS = 21, 3, 9, 1
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")
PACKING = {"name": "torch", "packing": True}


@pytest.mark.parametrize("kind", sorted(PACKED))
@pytest.mark.parametrize("cls", [AutoModel, AutoModelForSequenceClassification])
def test_rows_are_as_each_is_alone(kind: str, cls: Any) -> None:
    torch.manual_seed(0)
    model = cls.from_config(AutoConfig.for_model(kind, **{**SIZES, **OWN.get(kind, {})})).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(4)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.where(mask.bool(), torch.randint(3, 200, mask.shape), 1)
    with torch.inference_mode():
        alone = [model(input_ids=ids[k : k + 1, :length]) for k, length in enumerate(LENGTHS)]
        read: list[int] = []
        model.get_input_embeddings().register_forward_hook(
            lambda _, given, made: read.append(given[0].numel())
        )
        pack_batches(model)
        together = model(input_ids=ids, attention_mask=mask)
    assert read == [sum(LENGTHS)]
    for row, one in enumerate(alone):
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                found = together[name][row][: len(value[0])] if value.dim() == 3 else together[name][row]
                torch.testing.assert_close(found, value[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("cls", "columns", "head"),
    [
        (Embedding, {"text": sentences(20)}, "MaskedLM"),
        (TextClassification, {"text": sentences(20)}, "SequenceClassification"),
        (TokenClassification, {"text": sentences(20)}, "TokenClassification"),
        (QuestionAnswering, {"question": ["Who?"] * 20, "context": sentences(20)}, "QuestionAnswering"),
    ],
)
def test_tasks_give_the_same_without_padding(
    tmp_path: Path, cls: type[Task], columns: Any, head: str
) -> None:
    folder = tiny_bert_for(tmp_path, head)
    task: Any = make(cls, folder)
    features = features_of(task, columns).table
    padded, packed = (
        Predictor(task, TorchEngine(EngineConfig(folder, task.auto_class, "float32", options=options)), 8)
        for options in (None, TorchEngineSpec.model_validate(PACKING))
    )
    want, found = padded.predict(features), packed.predict(features)
    arrays = {name: pa.array(values) for name, values in columns.items()}
    rows, wanted = (
        str([one.to_pylist() for one in task.postprocess(made.outputs, arrays)]) for made in (found, want)
    )
    assert NUMBER.sub("", rows) == NUMBER.sub("", wanted)
    np.testing.assert_allclose(
        [*map(float, NUMBER.findall(rows))], [*map(float, NUMBER.findall(wanted))], atol=1e-5
    )
    assert found.tokens == found.padded_tokens == want.tokens < want.padded_tokens


def test_an_output_is_packed_throughout(tmp_path: Path) -> None:
    folder = tiny_bert_encoder(tmp_path / "model")
    source = write_shards(tmp_path / "in", sentences(40), 2)
    specs = [
        make_spec("embedding", folder, source, tmp_path / "out", engine=engine, batch={"size": 8})
        for engine in (PACKING, "torch", {"packing": False})
    ]
    done = job_here(specs[0])
    assert done.report["padding"] == 0
    whole = read_output(tmp_path / "out")
    for spec in specs[1:]:
        with pytest.raises(SpecError, match=r"differs in engine.packing \(there: True, now: None\)"):
            make_plan(spec)
    min((tmp_path / "out").glob("part-*")).unlink()
    job_here(specs[0])
    assert read_output(tmp_path / "out").equals(whole)


def tiny_mpnet(folder: Path) -> str:
    """A model whose batches cannot be packed."""
    tokenizer = wordpiece_tokenizer(64)
    return save(folder, MPNetModel(MPNetConfig(**SIZES | {"vocab_size": len(tokenizer)})), tokenizer)


def test_endpoints_on_cpus_pack_what_they_can(tmp_path: Path, encoder: str) -> None:
    def packs(model: str, **engine: Any) -> bool:
        """Whether the engine of an endpoint packs its batches."""
        values = {"task": "embedding", "model": model, "engine": {"name": "torch", **engine}}
        config = plan_endpoint(ServeSpec.build(values)).config
        endpoint = Endpoint(EndpointConfig.from_json(config.to_json()))
        return cast(TorchEngine, endpoint.engine).packs

    assert packs(encoder)
    assert packs(encoder, packing=True)
    assert not packs(encoder, packing=False)
    assert not packs(encoder, quantization="int8_dynamic")
    assert not packs(tiny_mpnet(tmp_path))


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", sentences(4), 1)

    def fault(task: str, folder: str, **engine: Any) -> str:
        """The fault of a plan."""
        with pytest.raises(SpecError) as caught:
            make_plan(make_spec(task, folder, source, tmp_path / "out", engine={**PACKING, **engine}))
        (found,) = caught.value.faults
        return found

    mpnet = tiny_mpnet(tmp_path / "mpnet")
    assert "is of type 'mpnet', and packed batches are for albert, bert, " in fault("embedding", mpnet)
    llama = tiny_llama(tmp_path / "llama")
    assert "task text-generation needs continuations of prompts" in fault("text-generation", llama)
    bert = tiny_bert_encoder(tmp_path / "bert")
    assert "packing is for a model on one device that is not compiled" in fault(
        "embedding", bert, compile=True
    )


def test_queries_whose_padding_is_read_are_not_packed(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", sentences(4), 1)
    folder = tiny_pylate(tmp_path / "late")
    values = {"engine": PACKING, "params": {"kind": "query"}}
    with pytest.raises(SpecError, match="reads tokens that its attention mask hides"):
        make_plan(make_spec("multi-vector-embedding", folder, source, tmp_path / "out", **values))
    make_plan(make_spec("multi-vector-embedding", folder, source, tmp_path / "out", engine=PACKING))


def test_options_that_would_be_ignored_are_errors() -> None:
    tensor = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="cannot attend with softcap"):
        attend(torch.nn.Linear(1, 1), tensor, tensor, tensor, None, softcap=5.0)
    with pytest.raises(ValueError, match="cannot attend with a mask"):
        attend(torch.nn.Linear(1, 1), tensor, tensor, tensor, torch.ones(1, 1, 2, 2))

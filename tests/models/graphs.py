"""Folders with a small graph in place of weights, as optimum exports it; the graph is written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from transformers import BertConfig

from tests.models.text import labels_of, wordpiece_tokenizer

WIDTH = 8
INPUTS = "input_ids", "attention_mask", "token_type_ids"


def tiny_graph(
    folder: Path,
    output: str = "logits",
    inside: str = "",
    takes: Sequence[str] = INPUTS,
    sizes: tuple[Any, Any] = ("rows", "tokens"),
    external: str = "",
    half: bool = False,
    head: str = "",
) -> np.ndarray:
    """A graph that embeds tokens and their types; `logits` are its mean over the tokens, other outputs are per token.

    :param inside: folder of the graph in the model's, such as `onnx/`.
    :param external: name of a file that the weights go to; without one, they are in the graph.
    :param half: whether the graph computes in float16.
    :param head: of the model by its config, if the graph is of another.
    :returns: the embeddings of the tokens, [tokens, 8]: each type adds 1.
    """
    tokenizer = wordpiece_tokenizer(64)
    tokenizer.save_pretrained(folder)
    sized = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    names = labels_of({place: f"class {place}" for place in range(WIDTH)})
    head = head or ("ForSequenceClassification" if output == "logits" else "Model")
    BertConfig(**sized, architectures=[f"Bert{head}"], intermediate_size=8, **names).save_pretrained(folder)
    kind = np.float16 if half else np.float32
    weights = np.random.default_rng(0).normal(size=(len(tokenizer), WIDTH)).astype(kind)
    types = np.stack([np.zeros(WIDTH, kind), np.ones(WIDTH, kind)])
    nodes = [
        helper.make_node("Gather", ["tokens", "input_ids"], ["embedded"]),
        helper.make_node("Gather", ["types", "token_type_ids"], ["typed"]),
        helper.make_node("Add", ["embedded", "typed"], ["sum"]),
    ]
    if "token_type_ids" not in takes:
        nodes = [helper.make_node("Gather", ["tokens", "input_ids"], ["sum"])]
    number = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    shape: list[Any] = [*sizes, WIDTH]
    if output == "logits":
        shape = [sizes[0], WIDTH]
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=number),
            helper.make_node("Unsqueeze", ["mask", "last"], ["masks"]),
            helper.make_node("Mul", ["sum", "masks"], ["kept"]),
            helper.make_node("ReduceSum", ["kept", "first"], ["added"], keepdims=0),
            helper.make_node("ReduceSum", ["masks", "first"], ["count"], keepdims=0),
            helper.make_node("Div", ["added", "count"], [output]),
        ]
    else:
        nodes.append(helper.make_node("Identity", ["sum"], [output]))
    constants = [("tokens", weights), ("types", types), ("last", np.array([-1])), ("first", np.array([1]))]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.INT64, list(sizes)) for name in takes],
        [helper.make_tensor_value_info(output, number, shape)],
        [numpy_helper.from_array(value, name) for name, value in constants],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    file = folder / inside / "model.onnx"
    file.parent.mkdir(exist_ok=True)
    options = {"location": external, "size_threshold": 100, "convert_attribute": False} if external else {}
    onnx.save_model(made, file, save_as_external_data=bool(external), **options)
    return weights


def as_openvino(folder: Path) -> None:
    """Writes the graph of a folder for OpenVINO, and removes the other one."""
    import openvino

    file = folder / "model.onnx"
    openvino.save_model(
        openvino.Core().read_model(file), folder / "openvino_model.xml", compress_to_fp16=False
    )
    file.unlink()

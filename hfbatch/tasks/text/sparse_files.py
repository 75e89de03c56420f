"""Reads the sentence-transformers files of a sparse encoder: how logits of tokens become weights of the vocabulary.

Reads JSON only and reports unsupported settings; runs no code of the model and does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hfbatch.tasks.sentence_modules import module_kind, task_of_files
from hfbatch.tasks.text.sentence_files import (
    TextFiles,
    add_fault,
    read_general,
    read_in,
    read_transformer,
)

if TYPE_CHECKING:
    from hfbatch.hub.models import Model

TASK = "sparse-embedding"
POOLINGS = ("max", "sum")
ACTIVATIONS = ("relu", "log1p_relu")
OTHER_KINDS = {
    "Router": "has one encoder for queries and another for documents (inference-free); write config.json, the weights and the "
    "tokenizer of its document encoder to a folder without modules.json, give that folder, and set params.pooling and "
    "params.activation as its SpladePooling has them",
    "SparseStaticEmbedding": "looks the weight of each token up and runs no model (inference-free); its tokenizer and its table "
    "are all that a query needs. For documents, choose a model with an MLM head, such as a SPLADE model",
    "SparseAutoEncoder": "is an autoencoder over dense vectors (CSR); compute the dense vectors with task embedding and its base "
    "model, or choose a model with an MLM head, such as a SPLADE model",
}
"""Modules of sparse encoders that are not supported, and what to use."""


@dataclass(frozen=True)
class SparseFiles(TextFiles):
    """How a row's logits [tokens, vocabulary] become a vector, and the preparation of the model's input."""

    pooling: str = "max"
    activation: str = "relu"
    """relu for log(1 + relu(logits)), log1p_relu for log(1 + log(1 + relu(logits)))."""


def read_sparse_files(model: Model) -> SparseFiles:
    """Reads the sentence-transformers files of a model; without them, returns the maximum over tokens."""
    modules = model.read_json("modules.json")
    if modules is None:
        return SparseFiles()
    files = read_general(model, SparseFiles(found=True))
    if (task := task_of_files(model)) not in (TASK, None):
        return add_fault(files, f"its sentence-transformers files are those of task {task}; use that task")
    for module in modules:
        files = _read_module(model, files, module["type"], module.get("path", ""))
    if not files.faults and not any(module_kind(module["type"]) == "SpladePooling" for module in modules):
        files = add_fault(files, "modules.json has no SpladePooling module; choose a SPLADE model")
    return files


def _read_module(model: Model, files: SparseFiles, dotted: str, folder: str) -> SparseFiles:
    match module_kind(dotted):
        case "MLMTransformer" | "Transformer" as name:
            # Before version 5.4, MLMTransformer alone ran the head, and its config said nothing of it.
            usual = "fill-mask" if name == "MLMTransformer" else "feature-extraction"
            return read_transformer(model, files, folder, TASK, "fill-mask", usual)
        case "SpladePooling":
            return _read_pooling(model, files, folder)
        case name:
            instead = OTHER_KINDS.get(name, "cannot be applied (MLMTransformer and SpladePooling can)")
            return add_fault(files, f"its module {name or dotted} {instead}")


def _read_pooling(model: Model, files: SparseFiles, folder: str) -> SparseFiles:
    config = read_in(model, folder, "config.json") or {}
    pooling = config.get("pooling_strategy", "max")
    activation = config.get("activation_function", "relu")
    if pooling not in POOLINGS:
        files = add_fault(
            files, f"its pooling_strategy {pooling!r} is not supported; choose a model with max or sum"
        )
    if activation not in ACTIVATIONS:
        files = add_fault(
            files,
            f"its activation_function {activation!r} is not supported; choose a model with relu or log1p_relu",
        )
    return replace(files, pooling=pooling, activation=activation)

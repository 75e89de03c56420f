"""Names of the modules in modules.json, and the task that the files beside a model are written for. Reads JSON only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfbatch.hub.models import Model

STANFORD = "HF_ColBERT"
"""The architecture that config.json of an original ColBERT checkpoint names."""
METADATA = "artifact.metadata"
"""Its file of settings, which stays where another tool has saved the model without the projection."""
SPARSE = frozenset(("SpladePooling", "SparseAutoEncoder", "SparseStaticEmbedding", "MLMTransformer"))
"""Modules of sparse encoders."""
LATE = ("ColBERT", "MultiVectorEncoder")
"""Types of models with a vector for each token, in config_sentence_transformers.json: of PyLate, of sentence-transformers."""


def task_of_files(model: Model) -> str | None:
    """Returns the task that the files beside a model are written for; None if there are none."""
    if is_stanford(model):
        return "multi-vector-embedding"
    modules = model.read_json("modules.json")
    if modules is None:
        return None
    kind = (model.read_json("config_sentence_transformers.json") or {}).get("model_type")
    names = {module_kind(module["type"]) for module in modules}
    if kind in LATE or "MultiVectorMask" in names or is_pylate(model):
        return "multi-vector-embedding"
    return "sparse-embedding" if kind == "SparseEncoder" or names & SPARSE else "embedding"


def is_pylate(model: Model) -> bool:
    """Whether the files beside a model are those of PyLate; early versions write no type."""
    config = model.read_json("config_sentence_transformers.json") or {}
    types = [module["type"] for module in model.read_json("modules.json") or []]
    return (
        config.get("model_type") == "ColBERT"
        or "query_prefix" in config
        or any(name.startswith("pylate.") for name in types)
    )


def is_stanford(model: Model) -> bool:
    """Whether a model is an original ColBERT checkpoint, with its projection among the weights, or was made from one."""
    if not model.folder or model.read_json("modules.json") is not None:
        return False
    written = (model.read_json("config.json") or {}).get("architectures") or []
    return STANFORD in written or (Path(model.folder) / METADATA).is_file()


def module_kind(dotted: str) -> str:
    """Returns the class name of a module of sentence-transformers or PyLate, whose dotted path differs by version."""
    return dotted.rsplit(".", 1)[-1] if dotted.startswith(("sentence_transformers.", "pylate.")) else ""

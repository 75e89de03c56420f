"""Reads the files of a model for late interaction: how a text becomes one vector for each of its tokens.

Three kinds: those of PyLate, those of sentence-transformers' MultiVectorEncoder, and an original ColBERT checkpoint. Reads
JSON and headers of weights only and reports unsupported settings; runs no code of the model and does not import torch.

Sources: `ColBERT` in pylate/models/colbert.py, `MultiVectorEncoder` and `MultiVectorMask` in sentence-transformers, and
`DocTokenizer`, `QueryTokenizer` and `ColBERT.mask` of stanford-futuredata/ColBERT.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfbatch.hub.weights import shapes_of, weight_files
from hfbatch.tasks.sentence_modules import METADATA, is_pylate, is_stanford, module_kind, task_of_files
from hfbatch.tasks.text.sentence_files import (
    Dense,
    Normalize,
    TextFiles,
    add_fault,
    read_dense,
    read_general,
    read_in,
    read_transformer,
    transformer_config,
)

if TYPE_CHECKING:
    from hfbatch.hub.models import Model

TASK = "multi-vector-embedding"
TOKENS = "token_embeddings"
PUNCTUATION = tuple(string.punctuation)


@dataclass(frozen=True)
class Expansion:
    """Tokens behind a short query, each of which has a vector too."""

    length: int
    """Tokens of a query with them."""
    fixed: bool = True
    """Whether longer queries are truncated to this length."""
    attend: bool = False
    """Whether the tokens of the query see them."""
    token: str | None = None
    """None for the mask token, or the token that ends a text where there is none."""


@dataclass(frozen=True)
class LateFiles(TextFiles):
    """How texts of each kind, `document` and `query`, are prepared, and what is computed from hidden states."""

    steps: tuple[Normalize | Dense, ...] = (Normalize(),)
    """Modules applied to the vector of each token, in order."""
    markers: Mapping[str, str] = field(default_factory=dict)
    """The token behind the first one, by kind."""
    lengths: Mapping[str, int | None] = field(default_factory=dict)
    """Maximum tokens, marker included, by kind."""
    expansion: Expansion | None = None
    """Of queries."""
    skipped: tuple[str, ...] = ()
    """Tokens without a vector."""
    skipped_of: tuple[str, ...] = ("document",)
    """Kinds of texts in which they are skipped."""
    only: tuple[int, ...] = ()
    """Token ids to which the vectors of documents are restricted; empty for all."""


def read_late_files(model: Model) -> LateFiles:
    """Reads the files of a model; without them, and with those of a single vector, returns vectors of length 1."""
    written = (model.read_json("config.json") or {}).get("architectures") or []
    if any(name.endswith("ForRetrieval") for name in written):
        return add_fault(
            LateFiles(),
            f"{written[0]} projects vectors itself, mostly those of images, and is not supported; use MultiVectorEncoder of "
            "sentence-transformers, or choose a ColBERT model",
        )
    modules = model.read_json("modules.json")
    if modules is None:
        return _read_stanford(model) if is_stanford(model) else LateFiles()
    files = read_general(model, LateFiles())
    task = task_of_files(model)
    if task == "sparse-embedding":
        return add_fault(files, f"its sentence-transformers files are those of task {task}; use that task")
    if task == "embedding":
        return _read_encoder(model, files, modules)
    files = replace(files, found=True)
    return _read_pylate(model, files, modules) if is_pylate(model) else _read_native(model, files, modules)


def _read_encoder(model: Model, files: LateFiles, modules: list[dict[str, Any]]) -> LateFiles:
    """Reads the transformer alone of a model for single vectors."""
    for module in modules:
        if module_kind(module["type"]) == "Transformer":
            files = read_transformer(model, files, module.get("path", ""), TASK)
    return files


def _read_pylate(model: Model, files: LateFiles, modules: list[dict[str, Any]]) -> LateFiles:
    """Reads the files of PyLate, which keeps Transformer and Dense modules alone and always normalizes."""
    config = model.read_json("config_sentence_transformers.json") or {}
    for module in modules:
        kind, folder = module_kind(module["type"]), module.get("path", "")
        if kind == "Transformer":
            files = read_transformer(model, files, folder, TASK)
        elif kind == "Dense":
            files = _with_dense(model, files, folder, None)
        elif kind not in ("Pooling", "Normalize", "Dropout"):
            files = _unknown(files, module["type"])
    steps = tuple(step for step in files.steps if isinstance(step, Dense))
    expansion = Expansion(
        int(_given(config, "query_length", 32)),
        attend=bool(_given(config, "attend_to_expansion_tokens", False)),
    )
    return replace(
        files,
        steps=(*steps, Normalize()),
        markers={
            "document": _given(config, "document_prefix", "[D] "),
            "query": _given(config, "query_prefix", "[Q] "),
        },
        lengths={"document": int(_given(config, "document_length", 180)), "query": expansion.length},
        expansion=expansion if _given(config, "do_query_expansion", True) else None,
        skipped=tuple(_given(config, "skiplist_words", PUNCTUATION)),
    )


def _read_native(model: Model, files: LateFiles, modules: list[dict[str, Any]]) -> LateFiles:
    """Reads the files of sentence-transformers' MultiVectorEncoder, whose markers are prompts."""
    files = replace(files, steps=(), default_prompt=None)  # the prompt named as the kind, or none
    for module in modules:
        kind, folder = module_kind(module["type"]), module.get("path", "")
        if kind == "Transformer":
            files = read_transformer(model, files, folder, TASK)
            files = _with_lengths(files, transformer_config(model, folder))
        elif kind == "Dense":
            files = _with_dense(model, files, folder, TOKENS)
        elif kind == "Normalize":
            of = (read_in(model, folder, "config.json") or {}).get("module_input_name", "sentence_embedding")
            if of == TOKENS:
                files = replace(files, steps=(*files.steps, Normalize()))
        elif kind == "MultiVectorMask":
            files = _with_mask(files, read_in(model, folder, "config.json") or {})
        elif kind != "Dropout":
            files = _unknown(files, module["type"])
    return files


def _with_lengths(files: LateFiles, config: Mapping[str, Any]) -> LateFiles:
    lengths = {kind: config.get(f"{kind}_length") for kind in ("document", "query")}
    given, expansion = config.get("query_expansion"), None
    if given:
        expansion = Expansion(
            int(given["length"]), given["strategy"] == "fixed", bool(given.get("attend")), given.get("token")
        )
        if expansion.fixed:
            lengths["query"] = expansion.length
        elif lengths["query"]:
            lengths["query"] = max(lengths["query"], expansion.length)
    return replace(files, lengths=lengths, expansion=expansion)


def _with_mask(files: LateFiles, config: Mapping[str, Any]) -> LateFiles:
    kinds = config.get("skiplist_tasks") or ["document"]
    return replace(
        files,
        skipped=tuple(config.get("skiplist_words") or ()),
        skipped_of=(kinds,) if isinstance(kinds, str) else tuple(kinds),
        only=tuple(config.get("keep_only_token_ids") or ()),
    )


def _with_dense(model: Model, files: LateFiles, folder: str, of: str | None) -> LateFiles:
    """Adds a Dense module. :param of: what it has to be applied to; None where PyLate applies it to tokens in any case."""
    dense, faults = read_dense(model, folder, of)
    files = replace(files, faults=(*files.faults, *faults))
    return files if dense is None else replace(files, steps=(*files.steps, dense))


def _unknown(files: LateFiles, dotted: str) -> LateFiles:
    return add_fault(
        files,
        f"modules.json has a module {dotted!r}, which task {TASK} cannot apply (it applies: Transformer, Dense, Normalize, "
        "MultiVectorMask); choose another model",
    )


def _read_stanford(model: Model) -> LateFiles:
    """Reads an original ColBERT checkpoint, whose artifact.metadata holds its settings; the defaults are ColBERT's."""
    files = LateFiles(found=True)
    try:
        config = model.read_json(METADATA) or {}
    except ValueError as error:
        return add_fault(files, f"{METADATA} is not JSON ({error}); download it again")
    hidden = (model.read_json("config.json") or {}).get("hidden_size")
    shape = [config.get("dim", 128), hidden]
    if not model.hub:  # the weights of a Hub model are not downloaded before the job starts
        folder = Path(model.folder)
        shapes = dict(pair for name in weight_files(folder) for pair in shapes_of(folder / name))
        if "linear.weight" not in shapes:
            return add_fault(
                files,
                "its files are those of a ColBERT checkpoint, and its weights lack linear.weight, the projection; give the original "
                "checkpoint, or a folder to which MultiVectorEncoder of sentence-transformers has saved it",
            )
        shape = shapes["linear.weight"]
    expansion = Expansion(
        int(_given(config, "query_maxlen", 32)), attend=bool(_given(config, "attend_to_mask_tokens", False))
    )
    return replace(
        files,
        steps=(Dense("", in_features=int(shape[1] or 0), out_features=int(shape[0])), Normalize()),
        markers={
            "document": _given(config, "doc_token_id", "[unused1]"),
            "query": _given(config, "query_token_id", "[unused0]"),
        },
        lengths={"document": int(_given(config, "doc_maxlen", 220)), "query": expansion.length},
        expansion=expansion,
        skipped=PUNCTUATION if _given(config, "mask_punctuation", True) else (),
    )


def _given(config: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns a setting; null stands for the default, as in PyLate."""
    found = config.get(name)
    return default if found is None else found

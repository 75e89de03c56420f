"""Task embedding: computes one vector per text, as sentence-transformers does, or per image."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.tasks.agreement import Vectors
from hfbatch.tasks.base import Batch, Example, Features, Histogram, TaskConfig
from hfbatch.tasks.multimodal.embedding_params import (
    EmbeddingParams,
    dense_faults,
    image_faults,
    param_faults,
    window_faults,
)
from hfbatch.tasks.positions import position_limit
from hfbatch.tasks.text.long_texts import (
    END,
    START,
    WEIGHT,
    Frame,
    pool_windows,
    slide,
    with_characters,
)
from hfbatch.tasks.text.pooling import apply_dense, load_dense, pool
from hfbatch.tasks.text.sentence_files import Dense, Normalize, Recipe, read_recipe
from hfbatch.tasks.text.windows import TOKENS
from hfbatch.tasks.tokens import (
    collate_text,
    flatten,
    length_faults,
    length_limit,
    list_lengths,
    lists_of,
    padding_id,
    require_tokens,
    run_text,
    token_counts,
    tokenize,
)
from hfbatch.tasks.vector_precision import fit_ranges, needs_ranges, store, stored_type
from hfbatch.tasks.vision.image_encoder import FULL_WIDTH, TextOrImageTask, encode_images, encode_texts
from hfbatch.tasks.vision.pixels import PLACES, names_in, run_by_shape, size_of, sizes_of
from hfbatch.tasks.vision.vision import decoded, shapes_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


SPAN = pa.struct([("start", pa.int32()), ("end", pa.int32())])
ENCODER_OF = ("t5", "mt5", "umt5")
"""Encoder-decoder models whose encoder alone computes embeddings."""


class Embedding(TextOrImageTask):
    """Computes one vector for each text or image.

    Models such as CLIP and SigLIP encode both into one space: their vectors are those of `get_text_features` and
    `get_image_features`.
    """

    name = "embedding"
    aliases = ("sentence-similarity",)
    summary = "One vector for each text or image, for search, clustering and deduplication"
    auto_class = "AutoModel"
    outputs: ClassVar[Mapping[str, str]] = {
        "embedding": "fixed-size list of float32, or as `precision` says; a list of them with `windows: {pool: none}`",
        "spans": "with `windows: {pool: none}`: list<struct<start, end>>, characters of each window",
    }
    Params = EmbeddingParams
    # The edges lie around 1, not on it: the length of normalized vectors differs from 1 in the last bit.
    agreement = Vectors("embedding")
    histogram = Histogram("norm", tuple(round(10 ** (step / 5 + 0.1), 6) for step in range(-11, 16)))
    carried = (WEIGHT, START, END)
    lasting = ("config", "recipe", "tokenizer")
    EXAMPLE = Example({"text": ["A man is eating food.", "The cat sleeps.", ""]})

    params: EmbeddingParams

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        if (self.model.read_json("config.json") or {}).get("model_type") in ENCODER_OF:
            self.auto_class = "AutoModelForTextEncoding"
        if self.params.windows:
            self.windows = TOKENS
        self._dense_weights: dict[str, dict[str, torch.Tensor]] = {}

    @property
    def unused(self) -> tuple[str, ...]:
        """The pooler, unless it computes the vectors of images."""
        return () if self.encodes == ("image",) and not self.poolings else super().unused

    def column_faults(self, present: set[str]) -> list[str]:
        """Also returns an error for a prompt or windows with images."""
        for name, given in (("prompt", self.prompt), ("windows", self.params.windows)):
            if present == {"image"} and given:
                return [f"params.{name} is for texts, and input has images; leave it out"]
        return super().column_faults(present)

    @cached_property
    def recipe(self) -> Recipe:
        """Settings from the model's sentence-transformers files."""
        return read_recipe(self.model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, which lowercases if the model's files say so."""
        tokenizer = super().tokenizer
        if self.recipe.lowercase and tokenizer.is_fast:
            from tokenizers.normalizers import Lowercase, Sequence

            own = tokenizer.backend_tokenizer.normalizer
            tokenizer.backend_tokenizer.normalizer = Sequence(
                [Lowercase(), *([own] if own is not None else [])]
            )
        return tokenizer

    @cached_property
    def limit(self) -> int | None:
        """Maximum tokens of a row."""
        return self.max_length or self.own_limit

    @property
    def own_limit(self) -> int | None:
        """Maximum tokens by the model's files; those of sentence-transformers may count positions that no token has."""
        if not self.recipe.max_length:
            return length_limit(self.tokenizer, self.config)
        return min(self.recipe.max_length, position_limit(self.config) or self.recipe.max_length)

    @cached_property
    def poolings(self) -> tuple[str, ...]:
        """Poolings whose results are concatenated; empty to use the vector that the model itself computes."""
        if self.params.pooling != "auto":
            return (self.params.pooling,)
        return () if "image" in self.encodes and not self.recipe.found else self.recipe.poolings

    @cached_property
    def steps(self) -> tuple[Normalize | Dense, ...]:
        """Modules applied to the pooled vector before truncation."""
        if self.params.normalize is False:
            return tuple(step for step in self.recipe.steps if not isinstance(step, Normalize))
        return self.recipe.steps

    @cached_property
    def prompt(self) -> str:
        """Text prepended to each row."""
        if self.params.prompt is not None:
            return self.params.prompt
        name = self.params.prompt_name or self.recipe.default_prompt
        return self.recipe.prompts.get(name, "") if name else ""

    @cached_property
    def prompt_tokens(self) -> int:
        """Number of tokens at the start of each row excluded from pooling."""
        if self.recipe.include_prompt or not self.prompt:
            return 0
        ids = tokenize(self.tokenizer, self._cased([self.prompt]), max_length=self.limit).table["input_ids"][
            0
        ]
        tokens = ids.as_py()
        return len(tokens) - (1 if tokens and tokens[-1] in self.tokenizer.all_special_ids else 0)

    @cached_property
    def frame(self) -> Frame | None:
        """The windows over long texts; None if texts are truncated, or have no limit."""
        windows = self.params.windows
        if windows is None or (size := windows.size or self.limit) is None:
            return None
        prompt = self._cased([self.prompt])[0]
        return Frame.of(self.tokenizer, prompt, size, windows.stride)

    @property
    def unit(self) -> bool:
        """Whether vectors have length 1, unless they are truncated."""
        return self.params.normalize is True or self.steps[-1:] == (Normalize(),)

    @cached_property
    def full_dimension(self) -> int | None:
        """Dimension of vectors before truncation; None if the config does not specify it."""
        for step in reversed(self.recipe.steps):
            if isinstance(step, Dense):
                return step.out_features
        if "image" in self.encodes:
            return shapes_of(self, self.pixels, self._see)["vectors"][1]
        hidden = getattr(self.config.get_text_config(), "hidden_size", None)
        return None if hidden is None else int(hidden) * len(self.poolings)

    @cached_property
    def dimension(self) -> int:
        """Dimension of the vectors."""
        full = self.full_dimension or 0
        wanted = self.params.truncate_dim or self.recipe.truncate_dim or full
        return min(wanted, full)

    def check(self) -> list[str]:
        """Returns errors in the sentence-transformers files and in params."""
        where = f"model {self.model.name!r}"
        faults = [f"{where}: {fault}" for fault in self.recipe.faults]
        if "image" in self.encodes:
            faults += image_faults(self, where)
            if faults:
                return faults
        if self.full_dimension is None:
            faults.append(f"{where}: its config has no hidden_size; choose a text encoder for task embedding")
        if "text" in self.encodes:
            faults += length_faults(self.max_length, self.tokenizer, self.config)
            faults += window_faults(self, where) if not faults else []
        return faults + dense_faults(self, where) + param_faults(self, where)

    @property
    def shortened(self) -> bool:
        """Whether truncation of dimensions reduces vectors to a length below 1."""
        return (
            self.full_dimension is not None
            and self.dimension < self.full_dimension
            and Normalize() in self.steps
        )

    def notes(self) -> list[str]:
        """Returns notes on defaults without sentence-transformers files, and on unused prompts."""
        notes = []
        if not self.recipe.found:
            normalized = "normalized" if self.params.normalize is True else "not normalized"
            pooling = f"{'+'.join(self.poolings)} pooling" if self.poolings else "the model's own vectors"
            notes.append(f"no sentence-transformers files beside the model: {pooling}, {normalized}")
        if self.recipe.prompts and not self.prompt and self.params.prompt is None:
            names = ", ".join(self.recipe.prompts)
            notes.append(
                f"the model comes with prompts ({names}) and none is used; set params.prompt_name to use one"
            )
        if self.shortened and self.params.normalize == "auto":
            notes.append(
                "truncate_dim reduces normalized vectors to a length below 1; params.normalize: true corrects that"
            )
        if self.fits:
            notes.append(
                f"precision {self.params.precision} takes the ranges of the dimensions from rows of the first split, for the "
                "whole job; queries need the same, which job.json then holds: params.ranges"
            )
        return notes

    def output_fields(self) -> list[pa.Field]:
        """`embedding`: a vector, or a list of those of all windows, with `spans`."""
        kind = stored_type(self.params.precision, self.dimension)
        if not self.each_window:
            return [pa.field("embedding", kind)]
        return [pa.field("embedding", pa.list_(kind)), pa.field("spans", pa.list_(SPAN))]

    @property
    def each_window(self) -> bool:
        """Whether a row has a vector for each of its windows."""
        return self.params.windows is not None and self.params.windows.pool == "none"

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Returns tokens of each text with the prompt, or pixels of each image.

        :raises ValueError: for a text without any token, and an unreadable image.
        """
        if "image" in columns:
            return Features(self.pixels.features(decoded(columns["image"], self.files)))
        texts = columns["text"].to_pylist()
        if self.prompt:
            texts = [self.prompt + text for text in texts]
        if self.frame is None:
            return require_tokens(tokenize(self.tokenizer, self._cased(texts), max_length=self.limit))
        if self.each_window:
            whole = Features(with_characters(self.tokenizer, texts, len(self.prompt)))
        else:
            whole = tokenize(self.tokenizer, self._cased(texts))
        return Features(slide(require_tokens(whole).table, self.frame))

    def _cased(self, texts: list[str]) -> list[str]:
        """Lowercases texts if the tokenizer should do it but has no normalizer."""
        if self.recipe.lowercase and not self.tokenizer.is_fast:
            return [text.lower() for text in texts]
        return texts

    def lengths(self, features: pa.Table) -> np.ndarray:
        """Returns the number of tokens in each text, or of elements in each image."""
        return sizes_of(features) if names_in(features) else token_counts(features["input_ids"])

    def padded_size(self, batch: Batch) -> int:
        """Returns the number of tokens in texts, padding included, or of elements in images."""
        return size_of(batch) if PLACES in batch else super().padded_size(batch)

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Returns texts padded on the right, which affects neither encoders nor causal models; images by shape."""
        if names_in(features):
            return self.pixels.collate(features, rows)
        if self.config.model_type in FULL_WIDTH:
            width = self.config.get_text_config().max_position_embeddings
            batch = collate_text(features, rows, self.tokenizer.pad_token_id, width, limit=width)
            return {"input_ids": batch["input_ids"]}
        pad_id = padding_id(self.tokenizer, self.config, self.vocabulary)
        return collate_text(features, rows, pad_id, multiple, limit=self.limit, full_mask=False)

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns `embedding`, float32 [batch, dimension]."""
        if PLACES in batch:
            found = run_by_shape(batch, model.dtype, lambda inputs: self._see(model, inputs))
            vectors = found["vectors"].float()
        elif "image" in self.encodes:
            vectors = encode_texts(model, batch).float()
        else:
            hidden = run_text(model, batch).last_hidden_state
            return {"embedding": self.join(hidden, batch.get("attention_mask"))}
        return {"embedding": self._finish(vectors)}

    def join(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Pools vectors of tokens [batch, tokens, size] into one vector per row, float32 [batch, dimension].

        :param mask: 1 for a token, 0 for padding, [batch, tokens]; None if nothing is padded.
        """
        return self._finish(pool(hidden, mask, self.poolings, self.prompt_tokens))

    def _finish(self, vectors: torch.Tensor) -> torch.Tensor:
        """Applies the steps after pooling: the model's further modules, truncation, normalization."""
        import torch
        from torch.nn.functional import normalize

        for step in self.steps:
            vectors = (
                self._apply_dense(step, vectors) if isinstance(step, Dense) else normalize(vectors, dim=-1)
            )
        vectors = vectors[:, : self.dimension]
        if self.params.normalize is True:
            vectors = normalize(vectors, dim=-1)
        return vectors.to(torch.float32).contiguous()

    def _see(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"vectors": encode_images(model, inputs, self.poolings)}

    def _apply_dense(self, dense: Dense, vectors: torch.Tensor) -> torch.Tensor:
        key = f"{dense.folder}@{vectors.device}"
        if key not in self._dense_weights:
            weights = load_dense(Path(self.model.folder), dense)
            self._dense_weights[key] = {name: tensor.to(vectors.device) for name, tensor in weights.items()}
        return apply_dense(dense, self._dense_weights[key], vectors)

    @property
    def compared(self) -> Embedding:
        """The task with vectors that are not rounded."""
        exact = self.params.model_copy(update={"precision": "float32", "ranges": "each"})
        return self.changed(params=exact)

    @property
    def ranges(self) -> list[list[float]] | None:
        """Minimum and maximum of each dimension, for int8 and uint8; None if they are not known yet."""
        given = self.params.ranges
        return given if isinstance(given, list) else (self.settings.fitted or {}).get("ranges")

    @property
    def fits(self) -> bool:
        """Whether the ranges of the dimensions are needed and not known yet."""
        return needs_ranges(self.params.precision) and self.ranges is None

    def fit(self, outputs: pa.Table) -> dict[str, Any]:
        """Returns the ranges of the dimensions. :raises ValueError: if no row has a vector."""
        return {"ranges": fit_ranges(self._vectors(outputs), self.params.ranges == "common")}

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Returns the vectors as they are stored."""
        stored = store(self._vectors(outputs), self.params.precision, self.ranges)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), stored.shape[1])
        if not self.each_window:
            return [vectors]
        places = [flatten(outputs[name]) for name in (START, END)]
        spans = pa.StructArray.from_arrays([place.flatten() for place in places], fields=list(SPAN))
        return [lists_of(values, list_lengths(places[0])) for values in (vectors, spans)]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the length (L2 norm) of each vector before it is rounded; the mean over windows that are not pooled."""
        rows = self._vectors(outputs)
        norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        if not self.each_window:
            return norms
        counts = list_lengths(outputs["embedding"])
        return np.add.reduceat(norms, np.cumsum(counts) - counts) / counts

    def _vectors(self, outputs: pa.Table) -> np.ndarray:
        """Returns the vectors, those of windows pooled: float32 [vectors, dimension]."""
        lists = flatten(outputs["embedding"])
        counts = list_lengths(lists) if self.params.windows else None
        vectors = lists if counts is None else lists.flatten()
        rows = vectors.flatten().to_numpy().reshape(len(vectors), -1)
        if self.params.windows is None or counts is None or self.each_window:
            return rows
        weights = flatten(outputs[WEIGHT]).flatten().to_numpy()
        return pool_windows(rows, counts, weights, self.params.windows.pool, self.unit)

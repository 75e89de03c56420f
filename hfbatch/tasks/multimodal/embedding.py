"""Task embedding: computes one vector per text, as sentence-transformers does, or per image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.tasks.agreement import Vectors
from hfbatch.tasks.base import Batch, Example, Features, Histogram, TaskConfig
from hfbatch.tasks.multimodal.embedding_settings import EmbeddingSettings
from hfbatch.tasks.text.encoder import ENCODER_OF
from hfbatch.tasks.text.long_texts import (
    END,
    START,
    WEIGHT,
    pool_windows,
    slide,
    with_characters,
)
from hfbatch.tasks.text.pooling import DenseLayers, pool
from hfbatch.tasks.text.windows import TOKENS
from hfbatch.tasks.tokens import (
    collate_text,
    flatten,
    list_lengths,
    lists_of,
    padding_id,
    require_tokens,
    run_text,
    token_counts,
    tokenize,
)
from hfbatch.tasks.vector_precision import fit_ranges, store, stored_type
from hfbatch.tasks.vision.image_encoder import FULL_WIDTH, encode_texts
from hfbatch.tasks.vision.pixels import PLACES, names_in, run_by_shape, size_of, sizes_of
from hfbatch.tasks.vision.vision import decoded

if TYPE_CHECKING:
    import torch


SPAN = pa.struct([("start", pa.int32()), ("end", pa.int32())])


class Embedding(EmbeddingSettings):
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
    # The edges lie around 1, not on it: the length of normalized vectors differs from 1 in the last bit.
    agreement = Vectors("embedding")
    histogram = Histogram("norm", tuple(round(10 ** (step / 5 + 0.1), 6) for step in range(-11, 16)))
    carried = (WEIGHT, START, END)
    EXAMPLE = Example({"text": ["A man is eating food.", "The cat sleeps.", ""]})

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        if (self.model.read_json("config.json") or {}).get("model_type") in ENCODER_OF:
            self.auto_class = "AutoModelForTextEncoding"
        if self.params.windows:
            self.windows = TOKENS
        self._dense = DenseLayers(self.model.folder)

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
        texts = self.prompted(columns["text"].to_pylist())
        if self.frame is None:
            return require_tokens(tokenize(self.tokenizer, texts, max_length=self.limit))
        if self.each_window:
            whole = Features(with_characters(self.tokenizer, texts, len(self.prompt)))
        else:
            whole = tokenize(self.tokenizer, texts)
        return Features(slide(require_tokens(whole).table, self.frame))

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

        vectors = self._dense.apply(self.steps, vectors)[:, : self.dimension]
        if self.params.normalize is True:
            vectors = normalize(vectors, dim=-1)
        return vectors.to(torch.float32).contiguous()

    @property
    def compared(self) -> Embedding:
        """The task with vectors that are not rounded."""
        exact = self.params.model_copy(update={"precision": "float32", "ranges": "each"})
        return self.changed(params=exact)

    def fit(self, outputs: pa.Table) -> dict[str, Any]:
        """Returns the ranges of the dimensions. :raises ValueError: if no row has a vector."""
        vectors = self._vectors(outputs) if len(outputs) else np.empty((0, self.dimension), np.float32)
        return {"ranges": fit_ranges(vectors, self.params.ranges == "common")}

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

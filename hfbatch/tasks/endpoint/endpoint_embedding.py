"""Task endpoint-embedding: vectors of texts by a model that somebody serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.engines.base import Call
from hfbatch.tasks.base import Example, Features, Histogram
from hfbatch.tasks.endpoint.base import EndpointParams, EndpointTask
from hfbatch.tasks.tokens import flatten, list_lengths, text_column

PATH = "/v1/embeddings"


class EndpointEmbedding(EndpointTask):
    """Turns each text of column `text` into a vector, by engine http and /v1/embeddings.

    A row that the endpoint refuses is a reject with its message; so is a vector that is not finite, or of another size than
    `dimensions`.
    """

    class Params(EndpointParams):
        """Null leaves an option to the endpoint."""

        dimensions: int | None = Field(default=None, ge=1)
        """Size of the vectors, for models that can shorten them."""

    params: Params
    name = "endpoint-embedding"
    summary = "Turn texts into vectors with a model that an endpoint serves"
    outputs: ClassVar[Mapping[str, str]] = {"embedding": "list<float32>"}
    inputs = (text_column("text"),)
    sets = frozenset(("model", "input", "dimensions", "encoding_format"))
    histogram = Histogram("norm", tuple(round(10 ** (step / 5 + 0.1), 6) for step in range(-11, 16)))
    ragged: ClassVar[Mapping[str, str]] = {"embedding": "size"}
    EXAMPLE = Example({"text": ["A man is eating food."]})

    def output_fields(self) -> list[pa.Field]:
        """`embedding`: list<float32>, since only answers show its size."""
        return [pa.field("embedding", pa.list_(pa.float32()))]

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Returns `text`. :raises ValueError: for an empty text, which endpoints refuse."""
        texts = columns["text"].cast(pa.large_string())
        if "" in texts.to_pylist():
            raise ValueError("the text is empty")
        return Features(pa.table({"text": texts}))

    def requests(self, features: pa.Table) -> list[Call]:
        """Returns the call of each row; calls share requests."""
        size = {"dimensions": self.params.dimensions} if self.params.dimensions else {}
        body = {"model": self.model.name, **size, **self.params.body}
        return [Call(PATH, body, self._read, text) for text in features["text"].to_pylist()]

    def _read(self, item: Any) -> np.ndarray:
        """Returns the vector of an item, float32. :raises ValueError: if it holds none that is finite and of the size."""
        given = item.get("embedding") if isinstance(item, Mapping) else None
        if not isinstance(given, list) or not given or not {*map(type, given)} <= {int, float}:
            raise ValueError("embedding is not a list of numbers")
        with np.errstate(over="ignore"):  # beyond float32: not finite
            vector = np.array(given, np.float32)
        if not np.isfinite(vector).all():
            raise ValueError("embedding is not a list of finite numbers")
        if self.params.dimensions not in (None, len(vector)):
            raise ValueError(
                f"embedding has {len(vector)} numbers, and params.dimensions is {self.params.dimensions}"
            )
        return vector

    def outputs_of(self, requests: Sequence[Call], answers: Sequence[np.ndarray]) -> dict[str, Any]:
        """Returns `embedding` float32 [rows, longest] and `size` int64 [rows]."""
        sizes = np.array([len(vector) for vector in answers], np.int64)
        vectors = np.zeros((len(answers), sizes.max(initial=0)), np.float32)
        for row, vector in enumerate(answers):
            vectors[row, : len(vector)] = vector
        return {"embedding": vectors, "size": sizes}

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Returns `embedding`."""
        return [flatten(outputs["embedding"]).cast(pa.list_(pa.float32()))]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the length (L2 norm) of each vector."""
        lists = flatten(outputs["embedding"])
        squares = lists.flatten().to_numpy().astype(np.float64) ** 2
        ends = np.cumsum(list_lengths(lists))
        sums = np.concatenate([[0.0], np.cumsum(squares)])[np.concatenate([[0], ends])]
        return np.sqrt(np.diff(sums))

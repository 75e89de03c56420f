"""Base class of tasks whose rows an endpoint answers: of the model, nothing is known but its name."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.engines.base import Call, Capability
from hfbatch.spec.job import TokenizerSpec
from hfbatch.tasks import base
from hfbatch.tasks.base import Batch, Task


class EndpointParams(base.Params):
    """Options of all requests. Null leaves an option to the endpoint."""

    body: dict[str, Any] = Field(default={})
    """More fields of every request, such as {top_k: 20, reasoning_effort: low}."""


class EndpointTask(Task):
    """Base class of tasks for engine http. A subclass defines the features, the call of each row and what it reads of answers."""

    Params: ClassVar[type[base.Params]] = EndpointParams
    takes = frozenset()
    auto_class = ""
    general = False
    finite = False
    added_tokens = 0
    vocabulary = None
    embedded = None
    not_embedded: ClassVar[dict[int, str]] = {}  # type: ignore[misc]
    split_rows = 1024
    sets: ClassVar[frozenset[str]] = frozenset({"model"})
    """Fields of a request that the task sets, which params.body may not."""
    decoding = None

    params: Any

    @property
    def config(self) -> Any:
        """None: the endpoint has the model's config."""
        return None

    @property
    def asks(self) -> frozenset[Capability]:
        """Answers of an endpoint."""
        return frozenset({Capability.ANSWER})

    def check(self) -> list[str]:
        """Returns errors for what only a model on this side has, and for fields that the task sets."""
        faults = []
        if self.tokenizer_changes != TokenizerSpec():
            faults.append("tokenizer: the endpoint has the tokenizer; leave the section out")
        if self.max_length is not None:
            faults.append("batch.max_length: the endpoint has the tokenizer, and its own limit; leave it out")
        if taken := sorted(self.sets & {*self.params.body}):
            faults.append(f"params.body cannot set {', '.join(taken)}, which the task sets; leave it out")
        try:
            json.dumps(self.params.body, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:  # YAML reads 2026-01-31 as a date, and .nan
            faults.append(f"params.body is not JSON: {error}; put the value in quotes, or leave it out")
        return faults

    @abstractmethod
    def requests(self, features: pa.Table) -> list[Call]:
        """Returns the call of each row."""

    @abstractmethod
    def outputs_of(self, requests: Sequence[Call], answers: Sequence[Any]) -> dict[str, Any]:
        """Returns what `postprocess` reads, for the answers of rows."""

    def lengths(self, features: pa.Table) -> np.ndarray:
        """Returns zeros: the endpoint counts the tokens."""
        return np.zeros(len(features), np.int64)

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Raises: there are no batches."""
        raise NotImplementedError(f"{self.name} runs on engine http alone")

    def forward(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Raises: there is no model."""
        raise NotImplementedError(f"{self.name} runs on engine http alone")

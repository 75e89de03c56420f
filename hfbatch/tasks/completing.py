"""What a task has besides `Task` so that a row engine can complete its texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from hfbatch.engines.base import Completion, Request

if TYPE_CHECKING:
    from transformers import GenerationConfig


class CompletingTask(Protocol):
    """What a task that asks for Capability.COMPLETE has besides, so that a row engine can do what `forward` does."""

    params: Any

    @property
    def decoding(self) -> GenerationConfig:
        """Options of all requests."""

    def requests(self, features: pa.Table) -> list[Request]:
        """Returns the request of each row."""

    def outputs_of(
        self, requests: Sequence[Request], completions: Sequence[Completion]
    ) -> dict[str, np.ndarray]:
        """Returns the outputs of forward, as arrays, for rows with these results."""

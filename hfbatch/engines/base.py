"""The engine interface: an engine holds a model on a device and runs batches. Does not import Ray."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from hfbatch.errors import HfbatchError

Forward = Callable[[Any, dict[str, Any]], dict[str, Any]]
"""Maps (model, batch of tensors on the device) to tensors of the same first dimension."""


class DeviceLostError(HfbatchError):
    """The device is unusable for the rest of this process; the work needs a new process."""


class Engine(ABC):
    """A loaded model. Batches are submitted in order and collected in the same order.

    `submit` may return before the device is done, so that the next batch is prepared and copied meanwhile; the
    caller keeps at most `depth` batches in flight.
    """

    name: ClassVar[str]
    device: str
    """The torch device type with the hardware model: `cuda (NVIDIA H200)`."""
    dtype: str
    depth: int = 1
    pad_multiple: int = 1
    """Padded lengths are multiples of this; of at most 8 for short batches."""
    batch_sizes: tuple[int, ...] = (16, 32)
    """Batch sizes that `batch.size: auto` tries."""
    batch_tokens: int | None = 4096
    """Default maximum of tokens in a batch of texts; on CPUs, activations of larger batches exceed the caches."""

    def expect(self, batches: int) -> None:  # noqa: B027 - most engines do not need it
        """Sets the number of batches of the next split, at least 1."""

    @abstractmethod
    def submit(self, batch: dict[str, np.ndarray], forward: Forward) -> Any:
        """Copies a batch to the device and starts the computation; returns a handle for `collect`."""

    @abstractmethod
    def collect(self, handle: Any) -> dict[str, np.ndarray]:
        """Waits for a batch and returns its results in host memory.

        :raises Exception: an error of the model that submit did not raise.
        """

    @abstractmethod
    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether a smaller batch may succeed."""

    @abstractmethod
    def release_memory(self) -> None:
        """Releases cached device memory after an out-of-memory error."""

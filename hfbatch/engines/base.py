"""What an engine is: it holds a model on a device and runs batches. Knows nothing of tasks, files and Ray."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from hfbatch.errors import HfbatchError

Forward = Callable[[Any, dict[str, Any]], dict[str, Any]]
"""(model, batch of tensors on the device) to tensors of the same first dimension."""


class DeviceLostError(HfbatchError):
    """The device cannot be used any more by this process: only a new process can go on."""


class Engine(ABC):
    """A loaded model. Batches are submitted in order and collected in the same order.

    `submit` may return before the device is done, so that the next batch is made and copied meanwhile; the
    caller keeps at most `depth` batches under way.
    """

    name: ClassVar[str]
    device: str
    """As torch names it, with the model of the hardware: `cuda (NVIDIA H200)`."""
    dtype: str
    depth: int = 1
    pad_multiple: int = 1
    """Padded lengths are multiples of this, short ones of 8 at most."""
    batch_sizes: tuple[int, ...] = (16, 32)
    """What `batch.size: auto` tries."""
    batch_tokens: int | None = 4096
    """Most tokens of a batch of texts unless the spec says; on CPUs, activations of more leave the caches."""

    def expect(self, batches: int) -> None:  # noqa: B027 - most engines have no use for it
        """Told before each split how many batches it has, at least 1."""

    @abstractmethod
    def submit(self, batch: dict[str, np.ndarray], forward: Forward) -> Any:
        """Copies a batch to the device and starts its computation; returns a handle for `collect`."""

    @abstractmethod
    def collect(self, handle: Any) -> dict[str, np.ndarray]:
        """Waits for a batch and returns its results in host memory.

        :raises Exception: what the model raised, where submit did not raise it already.
        """

    @abstractmethod
    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether a smaller batch may succeed."""

    @abstractmethod
    def release_memory(self) -> None:
        """Gives cached device memory back, after running out of it."""

"""A model worker: one process that holds the model and turns features into outputs. Knows nothing of Ray."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from hfbatch.compute.calibrate import choose_batch_size
from hfbatch.compute.machine import collector_at_rest, usable_cores
from hfbatch.compute.precision import native_dtype
from hfbatch.compute.predictor import BatchStats, Prediction, Predictor
from hfbatch.data.media_files import RowFiles
from hfbatch.data.models import Model
from hfbatch.location import WITH_SECRETS, Location
from hfbatch.spec import JobSpec
from hfbatch.tasks import task_class
from hfbatch.tasks.base import Task


@dataclass(frozen=True)
class Settled:
    """What was left to the first worker, and then holds for the whole job and for its reruns."""

    batch_size: int
    dtype: str
    device: str


@dataclass(frozen=True)
class WorkOrder:
    """Everything that a worker process needs to know of the job; small, and plain to pickle."""

    spec: JobSpec
    model: Model
    settled: Settled | None = None
    root: str = ""
    """Folder or URL that paths in the rows are relative to."""

    def to_json(self) -> str:
        """The order as text, which processes can compare; it holds the secrets of URLs."""
        settled = asdict(self.settled) if self.settled else None
        return json.dumps(
            {
                "spec": self.spec.model_dump(mode="json", context=WITH_SECRETS),
                "model": asdict(self.model),
                "settled": settled,
                "root": Location(self.root).unmasked,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> WorkOrder:
        """The reverse of to_json."""
        values = json.loads(text)
        settled = Settled(**values["settled"]) if values["settled"] else None
        return cls(JobSpec.build(values["spec"]), Model(**values["model"]), settled, Location(values["root"]))

    @collector_at_rest()
    def task(self) -> Task:
        """The job's task, with the model's files on this machine; transformers is told to be silent."""
        from transformers.utils import logging

        logging.set_verbosity_error()  # it would warn of single rows
        return build_task(self.spec, self.model.fetch(), self.root)


@collector_at_rest()
def build_task(spec: JobSpec, model: Model, root: str = "") -> Task:
    """A task object.

    :param root: folder or URL that paths in the rows are relative to.
    :raises pydantic.ValidationError: for params that the task does not have.
    """
    cls = task_class(spec.task)
    task = cls(model, cls.Params.model_validate(spec.params), spec.batch.max_length, spec.seed)
    task.files = RowFiles(root, spec.input.files)
    task.batch, task.tokenizer_changes = spec.batch, spec.tokenizer
    return task


class Worker:
    """Holds task, engine and predictor.

    :param order: the job.
    :param share: the part of this machine's cores that the worker may use, 0 to 1.
    """

    @collector_at_rest()
    def __init__(
        self, order: WorkOrder, share: float = 1.0, on_batch: Callable[[BatchStats], None] | None = None
    ):
        self.order = order
        self._on_batch = on_batch
        self._threads = max(round(usable_cores() * share), 1)
        self.task = order.task()
        self._load(self._dtype())

    def _dtype(self) -> str:
        if self.order.settled:
            return self.order.settled.dtype
        asked = self.order.spec.model.dtype
        return native_dtype()[1] if asked == "auto" else asked

    def _load(self, dtype: str) -> None:
        from hfbatch.engines.torch import TorchEngine

        model = self.task.model
        self.engine = TorchEngine(
            model.folder,
            self.task.auto_class,
            dtype,
            self._threads,
            model.trust_remote_code,
            self.task.concurrent,
            self.task.vocabulary,
            self.task.seed,
            self.task.unused,
        )

    def propose(self, features: pa.Table) -> Settled:
        """Batch size, dtype and device that suit this worker; tries sizes on the features if the spec leaves it."""
        size = self.order.spec.batch.size
        if size == "auto" and self.order.spec.batch.continuous:
            from hfbatch.tasks.parts.continuous import ROWS

            size = ROWS
        elif size == "auto":
            size = choose_batch_size(self.task, self.engine, features)
        return Settled(size, self.engine.dtype, self.engine.device)

    def settle(self, settled: Settled) -> None:
        """Takes the job's choices; loads the model again where another dtype was chosen."""
        if settled.dtype != self.engine.dtype:
            self._load(settled.dtype)
        size, tokens = settled.batch_size, self.order.spec.batch.tokens
        if tokens is None and self.order.spec.batch.size == "auto" and self.task.whole_texts:
            tokens = self.engine.batch_tokens
        if self.order.spec.batch.continuous:
            self.task.batch = self.order.spec.batch.model_copy(update={"size": size})
            size, tokens = self.order.spec.input.split_rows or self.task.split_rows, None
        self.predictor = Predictor(self.task, self.engine, size, tokens, self._on_batch)

    def predict(self, features: pa.Table) -> Prediction:
        """Outputs of a split's features, see Predictor."""
        return self.predictor.predict(features)

    @property
    def label(self) -> str:
        """Host and device."""
        return f"{socket.gethostname()} {self.engine.device}"


def embed_texts(model: str, texts: list[str]) -> np.ndarray:
    """Embeddings of a few texts in this process, without a cluster: float32 [texts, dimension].

    :param model: a model folder or Hub name.
    """
    from hfbatch.data.models import pin

    spec = JobSpec.build({"task": "embedding", "model": model, "input": "-", "output": "-"})
    worker = Worker(WorkOrder(spec, pin(spec.model)))
    worker.settle(Settled(len(texts), worker.engine.dtype, worker.engine.device))
    places = pa.table({"file": pa.array([""] * len(texts)), "row": pa.array(range(len(texts)), pa.int64())})
    features = worker.task.preprocess({"text": pa.array(texts)}, places)
    outputs: Any = worker.predict(features.table).outputs["embedding"].combine_chunks()
    return outputs.flatten().to_numpy().reshape(len(texts), -1)

"""The runner: preprocess, batch, predict and postprocess the rows of a table, in one process.

It is the one composition of these steps. The stages on the cluster call them in different processes; previews, trials
and searches call them in a row. Does not import Ray.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import pyarrow as pa

from hfbatch.engines import ENGINES
from hfbatch.engines.base import BatchEngine, Engine, EngineConfig, RowEngine
from hfbatch.engines.gguf import as_folder
from hfbatch.engines.precision import fastest_dtype, native_dtype
from hfbatch.errors import WorkerError
from hfbatch.output.rejects import Reject
from hfbatch.runtime.autotune import choose_batch_size
from hfbatch.runtime.config import RunnerConfig, RuntimeChoice
from hfbatch.runtime.machine import collector_at_rest, usable_cores
from hfbatch.runtime.predictor import BatchStats, Prediction, Predictor
from hfbatch.runtime.prepare import POSITION, Prepared, postprocess, preprocess, reject
from hfbatch.runtime.rows import RowPredictor
from hfbatch.runtime.windows import unfold

PREVIEW_BATCH = 32
"""Batch size of `run` where the spec leaves it open: a trial of sizes would take longer than a few rows."""


@dataclass
class Predicted:
    """What the model gives for features."""

    outputs: pa.Table
    """One row for each that has a prediction, in input order, with the column POSITION."""
    rejects: list[Reject]
    stats: Prediction
    """Tokens and batches."""


@dataclass
class Outcome:
    """What became of the rows of a table."""

    positions: np.ndarray
    """Of the rows that have a prediction, int64 in input order."""
    columns: dict[str, pa.Array]
    """The task's output columns of these rows."""
    rejects: list[Reject]
    """Of the other rows, in input order."""
    cut: np.ndarray
    """Which rows were truncated, bool [rows]."""
    stats: Prediction
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each step: load, preprocess, predict, postprocess."""


class Runner:
    """A task and, once it is loaded, its model.

    :param config: the settings.
    :param share: the part of this machine's cores that the model may use, 0 to 1.
    :param on_batch: called after each batch.
    """

    def __init__(
        self,
        config: RunnerConfig,
        share: float = 1.0,
        on_batch: Callable[[BatchStats], None] | None = None,
    ) -> None:
        from transformers.utils import logging

        logging.set_verbosity_error()  # it would warn of single rows
        self.config = replace(config, model=as_folder(config.model.fetch()))
        self.task = self.config.build_task()
        self.engine: Engine | None = None
        self._predictor: Predictor | RowPredictor | None = None
        self._threads = max(round(usable_cores() * share), 1)
        self._on_batch = on_batch

    def preprocess(
        self, columns: Mapping[str, pa.Array], places: pa.Table, unreadable: Sequence[Reject] = ()
    ) -> Prepared:
        """Features of rows, see `prepare.preprocess`. Needs no model."""
        return preprocess(self.task, columns, places, unreadable)

    def postprocess(
        self, outputs: pa.Table, columns: Mapping[str, pa.Array], fields: Sequence[pa.Field] | None = None
    ) -> tuple[np.ndarray, list[pa.Array], list[Reject]]:
        """Output columns of outputs, see `prepare.postprocess`. Needs no model."""
        return postprocess(
            self.task, self.task.output_fields() if fields is None else fields, outputs, columns
        )

    @collector_at_rest()
    def load(self, dtype: str | None = None) -> Engine:
        """Loads the model into the engine, in the dtype of the spec or of an earlier choice.

        :raises WorkerError: for a dtype that `auto` chose on another machine, and this one does not run natively.
        """
        model, choice, kind = self.task.model, self.config.choice, ENGINES[self.config.engine.name]
        device, native = native_dtype(kind.gpus)
        dtype = dtype or (choice.dtype if choice else self.config.dtype)
        if self.config.dtype == "auto" and dtype not in ("auto", "float32", native):
            raise WorkerError(
                f"model.dtype auto chose {dtype} for this job on another machine, and this one ({device}) "
                f"does not run it natively; use machines like that one, or set model.dtype={dtype} to run it here too"
            )
        if dtype == "auto":
            dtype = fastest_dtype(kind.gpus) if native in kind.dtypes else "float32"
        make, quantization = kind.load(), self.config.engine.quantization
        config = EngineConfig(
            model.folder,
            self.task.auto_class,
            dtype,
            self._threads,
            model.trust_remote_code,
            self.task.concurrent,
            self.task.vocabulary,
            self.task.seed,
            self.task.unused,
            self.config.engine,
            model.version,
            kind.needs(quantization),
            quantization,
        )
        self.engine = made = make(config)
        return made

    def propose(self, features: pa.Table, rows: int) -> RuntimeChoice:
        """Batch size, dtype and device that suit this process; tries sizes on features if the spec leaves it open.

        :param rows: rows of the job.
        """
        engine = self.engine or self.load()
        if isinstance(engine, BatchEngine):
            self._prepare(engine, _without_positions(features))
        size = self.config.batch.size
        if size == "auto" and isinstance(engine, RowEngine):
            size = engine.rows
        elif size == "auto":
            size = choose_batch_size(self.task, cast(BatchEngine, engine), _without_positions(features), rows)
        return RuntimeChoice(size, engine.dtype, engine.device, engine.name)

    def _prepare(self, engine: BatchEngine, features: pa.Table) -> None:
        """Has the engine prepare for batches such as that of the first two rows."""
        windows = unfold(self.task, features.slice(0, 2)).table
        if len(windows):
            batch = self.task.collate(windows, np.arange(min(len(windows), 2)), 1)
            engine.prepare(batch, self.task.trial_forward)

    def apply(self, choice: RuntimeChoice) -> None:
        """Takes the job's choice; loads the model again where another dtype was chosen."""
        engine = self.engine
        if engine is None or engine.dtype != choice.dtype:
            engine = self.load(choice.dtype)
        size, tokens = choice.batch_size, self.config.batch.tokens
        if isinstance(engine, RowEngine):
            self._predictor = RowPredictor(self.task, engine, size, tokens, self._on_batch)
            return
        engine = cast(BatchEngine, engine)
        if tokens is None and self.config.batch.size == "auto" and self.task.whole_texts:
            tokens = engine.batch_tokens
        self._predictor = Predictor(self.task, engine, size, tokens, self._on_batch)

    def predict(self, features: pa.Table) -> Predicted:
        """Outputs of features, see Predictor.

        :param features: with the column POSITION.
        :raises RuntimeError: if no choice has been applied.
        """
        if self._predictor is None:
            raise RuntimeError("call apply() before predict()")
        positions = features[POSITION].to_numpy()
        empty = Prediction(pa.table({}), np.empty(0, np.int64))
        made = self._predictor.predict(_without_positions(features)) if len(features) else empty
        rejects = [reject(int(positions[k]), "forward", error) for k, error in made.failures]
        outputs = made.outputs.append_column(POSITION, pa.array(positions[made.kept]))
        return Predicted(outputs, rejects, made)

    def run(
        self,
        columns: Mapping[str, pa.Array],
        places: pa.Table | None = None,
        unreadable: Sequence[Reject] = (),
    ) -> Outcome:
        """All steps over a table.

        :param columns: task input to array, all of one length.
        :param places: `file` and `row` of each row; default: rows of no file.
        :param unreadable: rejects of reading.
        """
        rows = len(next(iter(columns.values())))
        if places is None:
            places = pa.table({"file": pa.array([""] * rows), "row": pa.array(range(rows), pa.int64())})
        seconds: dict[str, float] = {}
        with _timed(seconds, "load"):
            self.apply(self.config.choice or self._default_choice())
        with _timed(seconds, "preprocess"):
            prepared = self.preprocess(columns, places, unreadable)
        with _timed(seconds, "predict"):
            predicted = self.predict(prepared.features)
        with _timed(seconds, "postprocess"):
            fields = self.task.fields_for(set(columns))
            positions, arrays, failures = self.postprocess(predicted.outputs, columns, fields)
        rejects = sorted(
            [*prepared.rejects, *predicted.rejects, *failures], key=lambda reject: reject.position
        )
        made = {column.name: array for column, array in zip(fields, arrays, strict=True)}
        return Outcome(positions, made, rejects, prepared.cut, predicted.stats, seconds)

    def _default_choice(self) -> RuntimeChoice:
        engine = self.engine or self.load()
        size = self.config.batch.size
        size = PREVIEW_BATCH if size == "auto" else size
        return RuntimeChoice(size, engine.dtype, engine.device, engine.name)

    @property
    def label(self) -> str:
        """Host and device."""
        return f"{socket.gethostname()} {self.engine.device}" if self.engine else socket.gethostname()


def _without_positions(features: pa.Table) -> pa.Table:
    return features.drop_columns([POSITION]) if POSITION in features.column_names else features


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begun

"""The runner: preprocess, batch, predict and postprocess the rows of a table, in one process.

It is the one composition of these steps. The stages on the cluster call them in different processes; previews, trials
and searches call them in a row. Does not import Ray.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa

from hfbatch.engines import ENGINES, kind_of
from hfbatch.engines.base import REMOTE, BatchEngine, Engine, EngineConfig, RowEngine
from hfbatch.engines.compilers import missing_to_compile
from hfbatch.engines.gguf import as_folder
from hfbatch.engines.precision import fastest_dtype, native_dtype
from hfbatch.errors import WorkerError
from hfbatch.output.rejects import Reject
from hfbatch.runtime.autotune import choose_batch_size
from hfbatch.runtime.checks import task_with
from hfbatch.runtime.config import RunnerConfig, RuntimeChoice
from hfbatch.runtime.distinct import distinct, repeat
from hfbatch.runtime.engine_trials import EngineSearch
from hfbatch.runtime.guard import Verdict, advice, compare, sample
from hfbatch.runtime.machine import collector_at_rest, usable_cores
from hfbatch.runtime.outcome import Outcome, Predicted
from hfbatch.runtime.predictor import BatchStats, Follow, Prediction, Predictor
from hfbatch.runtime.prepare import POSITION, Prepared, postprocess, preprocess, reject
from hfbatch.runtime.rows import RowPredictor
from hfbatch.runtime.variants import REFERENCE, Variant, is_quantised
from hfbatch.runtime.windows import unfold
from hfbatch.spec.engines import AutoEngineSpec

FIT_ROWS = 1024
"""Rows from which a task takes what `Task.fit` returns."""
PREVIEW_BATCH = 32
"""Batch size of `run` where the spec leaves it open: a trial of sizes would take longer than a few rows."""
PREVIEW_BATCH_ON_CPU = 8
"""The same where the cores compute batches at the same time: of 64 texts, batches of 8 took two thirds of the time of 32,
with less padding and less difference between the first and the last core that ends."""


class Runner:
    """A task and, once it is loaded, its model.

    :param config: the settings.
    :param share: the part of this machine's cores that the model may use, 0 to 1, unless the spec names their number.
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
        self._variant = REFERENCE
        self._predictor: Predictor | RowPredictor | None = None
        self._turn = threading.Lock()
        threads = config.engine.threads
        self._threads = max(round(usable_cores() * share), 1) if threads == "auto" else threads
        self._on_batch = on_batch or (lambda stats: None)
        self._dedupe = False

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

    def variant(self, choice: RuntimeChoice | None) -> Variant:
        """Engine and precision of the job's choice, or those of the spec, with what it leaves open.

        :raises WorkerError: for a choice of another machine that this one cannot honour.
        """
        spec = self.config.engine
        if not kind_of(spec.name).local:
            return Variant(spec.name, REMOTE)
        name = choice.engine if choice else "torch" if spec.name == "auto" else spec.name
        quantization = choice.quantization if choice else spec.quantization
        compiled = choice.compiled if choice else getattr(spec, "compile", False) is True
        dtype, kind = choice.dtype if choice else self.config.dtype, ENGINES[name]
        device, native = native_dtype(kind.gpus)
        known = "auto", "float32", native
        if self.config.dtype == "auto" and dtype not in known and not self.task.model.graphs:
            raise WorkerError(
                f"model.dtype auto chose {dtype} for this job on another machine, and this one ({device}) "
                f"does not run it natively; use machines like that one, or set model.dtype={dtype} to run it here too"
            )
        if missing := kind.missing(quantization) or (missing_to_compile() if compiled else []):
            raise WorkerError(f"engine {name} of this job needs {' and '.join(missing)} on every node")
        if self.task.model.graphs:
            return Variant(name, dtype)  # a graph has a dtype of its own
        if dtype == "auto":
            dtype = fastest_dtype(kind.gpus) if native in kind.dtypes else "float32"
        return Variant(name, dtype, quantization, compiled)

    def load(self, variant: Variant | None = None) -> Engine:
        """Loads the model, by default as an earlier choice or the spec says."""
        variant = variant or self.variant(self.config.choice)
        self.engine, self._predictor = self._build(variant), None
        self._variant = replace(variant, dtype=self.engine.dtype)
        return self.engine

    @collector_at_rest()
    def _build(self, variant: Variant) -> Engine:
        model, task, kind = self.task.model, self.task, ENGINES[variant.engine]
        config = EngineConfig(
            model.folder,
            task.auto_class,
            variant.dtype,
            self._threads,
            model.trust_remote_code,
            task.concurrent,
            task.vocabulary,
            task.seed,
            task.unused,
            self.config.engine,
            model.version,
            kind.needs(variant.quantization),
            variant.quantization,
            model.graphs.get(variant.engine, ""),
            variant.compiled,
            model.adapter,
            model.tokenizer_folder if model.adapter else "",
        )
        return kind.load()(config)

    def propose(self, features: pa.Table, rows: int, columns: Mapping[str, pa.Array]) -> RuntimeChoice:
        """The runtime choice that suits this process: engine and precision, compared with float32, and batch size.

        :param features: rows of one split.
        :param rows: rows of the job.
        :param columns: the task's input columns of the whole split.
        :raises WorkerError: if the model cannot run, or a lowered precision that the spec names changes results too much.
        """
        engine = self.engine or self.load()
        self.prepare(engine, features)
        trials = self._try_engines(engine, features, rows, columns)
        verdict = trials.verdict if trials else self.guard(features, rows, columns)
        engine = self.engine or engine
        size = self.config.batch.size
        if size == "auto" and isinstance(engine, RowEngine):
            size = engine.rows
        elif size == "auto":
            size = choose_batch_size(self.task, cast(BatchEngine, engine), _without_positions(features), rows)
        return RuntimeChoice(
            size,
            engine.dtype,
            engine.device,
            engine.name,
            self._variant.quantization,
            asdict(verdict) if verdict else None,
            [asdict(trial) for trial in trials.trials] if trials else None,
            self._variant.compiled,
            self.config.batch.dedupe,
            self._fit(features, size),
            self.config.batch.share_prefixes,
        )

    def _fit(self, features: pa.Table, size: int) -> dict[str, Any] | None:
        """Returns what the task needs from rows of the job, see `Task.fit`; None if it needs nothing, or has it."""
        if not self.task.fits:
            return None
        engine, lengths = cast(BatchEngine, self.engine), self.task.lengths(features)
        rows = _without_positions(features).take(pa.array(sample(lengths, FIT_ROWS, self.task.seed)))
        return self.task.fit(Predictor(self.task, engine, size).predict(rows).outputs)

    def take_fitted(self, fitted: Mapping[str, Any] | None) -> None:
        """Gives the task what it has fitted in another process, unless it has it."""
        if fitted is not None and self.task.fits:
            self.task = self.task.changed(fitted=fitted)

    def _try_engines(
        self, engine: Engine, features: pa.Table, rows: int, columns: Mapping[str, pa.Array]
    ) -> EngineSearch | None:
        """Takes the fastest variant if the spec leaves the engine open; None if nothing was tried."""
        spec = self.config.engine
        if not isinstance(spec, AutoEngineSpec) or not isinstance(engine, BatchEngine) or not len(features):
            return None

        def build(variant: Variant) -> Engine:
            """Loads a variant, ready for batches of such rows."""
            made = self._build(variant)
            self.prepare(made, features)
            return made

        search = EngineSearch(self.task, build, spec, features, rows, columns, self.config.dtype)
        if not search.run(self._variant, engine):
            return None
        self.engine, self._variant = search.engine, search.variant
        return search

    @property
    def guarded(self) -> bool:
        """Whether the loaded variant is to be compared with float32, or reported as one that cannot be."""
        if not ENGINES[self._variant.engine].local:
            return False
        lowered = self._variant.lowered or is_quantised(self.task) or bool(self.task.model.graphs)
        return lowered and self.config.engine.guard.mode != "skip"

    def guard(self, features: pa.Table, rows: int, columns: Mapping[str, pa.Array]) -> Verdict | None:
        """Compares the loaded variant with float32; loads float32 in its place where that is left open and it differs.

        :param features: see `propose`, as for the others.
        :returns: None if nothing is lowered, or the spec asks for no comparison.
        :raises WorkerError: if a lowered precision that the spec names changes results too much.
        """
        if not self.guarded or not len(features):
            return None
        spec, engine, shown = self.config.engine.guard, self.engine, str(self._variant)
        if graph := self.task.model.graphs.get(self._variant.engine):
            shown = f"the graph {graph} in {shown}"
        exact: list[Engine] = []

        def reference() -> Engine:
            exact.append(self._build(REFERENCE))
            return exact[0]

        verdict = compare(
            self.task,
            reference,
            cast(Engine, engine),
            shown,
            features,
            columns,
            spec,
            rows,
        )
        if verdict.status == "passed" or (verdict.status == "unguarded" and spec.mode == "auto"):
            return verdict
        if (
            verdict.status == "failed"
            and self.config.dtype == "auto"
            and self._variant.quantization == "none"
        ):
            self._take_float32(exact[0])
            return verdict
        raise WorkerError(f"{verdict.summary}. {advice(self._variant, verdict.status)}")

    def _take_float32(self, reference: Engine) -> None:
        """Runs the model in float32 from now on; in torch, that is the model of the comparison."""
        exact = replace(self._variant, dtype="float32")
        if exact == REFERENCE:
            self.engine, self._variant = reference, exact
        else:
            self.load(exact)

    def prepare(self, engine: Engine, features: pa.Table) -> None:
        """Has the engine prepare for batches such as that of the first two rows."""
        windows = unfold(self.task, _without_positions(features).slice(0, 2)).table
        if len(windows) and isinstance(engine, BatchEngine):
            batch = self.task.collate(windows, np.arange(min(len(windows), 2)), 1)
            engine.prepare(batch, self.task.trial_forward)

    def apply(self, choice: RuntimeChoice) -> None:
        """Takes the job's choice; loads the model again where another dtype was chosen."""
        self.take_fitted(choice.fitted)
        engine, variant, self._dedupe = self.engine, self.variant(choice), choice.dedupe
        if engine is None or self._variant != variant:
            engine = self.load(variant)
        size, tokens = choice.batch_size, self.config.batch.tokens
        if isinstance(engine, RowEngine):
            self._predictor = RowPredictor(self.task, engine, size, tokens, self._on_batch)
            return
        engine = cast(BatchEngine, engine)
        if tokens is None and self.config.batch.size == "auto" and self.task.whole_texts:
            tokens = engine.batch_tokens
        self._predictor = Predictor(self.task, engine, size, tokens, self._on_batch)

    def predict(self, features: pa.Table, few: bool = False, follow: Follow | None = None) -> Predicted:
        """Outputs of features, see Predictor.

        :param features: with the column POSITION.
        :param few: whether they may be fewer than a batch, in answers to requests.
        :param follow: called with positions and new tokens while texts are generated, see `Decoder`.
        :raises RuntimeError: if no choice has been applied.
        """
        if self._predictor is None:
            raise RuntimeError("call apply() before predict()")
        positions = features[POSITION].to_numpy()
        made, plain = Prediction(pa.table({}), np.empty(0, np.int64)), _without_positions(features)
        kinds = distinct(plain) if self._dedupe and follow is None else None
        plain = plain if kinds is None else plain.take(pa.array(kinds[0]))
        if len(features) and few and isinstance(self._predictor, Predictor):
            report = (lambda rows, tokens: follow(positions[rows], tokens)) if follow else None
            made = self._predictor.predict(plain, report, spread=True)
        elif len(features):
            made = self._predictor.predict(plain)
        if kinds is not None:
            made = repeat(made, kinds[1])
            self._on_batch(BatchStats(made.repeated, 0, 0, 0.0))
        rejects = [reject(int(positions[k]), "forward", error) for k, error in made.failures]
        outputs = made.outputs.append_column(POSITION, pa.array(positions[made.kept]))
        return Predicted(outputs, rejects, made)

    def run(
        self,
        columns: Mapping[str, pa.Array],
        places: pa.Table | None = None,
        unreadable: Sequence[Reject] = (),
        follow: Follow | None = None,
    ) -> Outcome:
        """All steps over a table. Threads may run tables at the same time: the model runs one after another.

        :param columns: task input to array, all of one length.
        :param places: `file` and `row` of each row; default: rows of no file.
        :param unreadable: rejects of reading.
        :param follow: see `predict`.
        """
        rows = len(next(iter(columns.values())))
        if places is None:
            places = pa.table({"file": pa.array([""] * rows), "row": pa.array(range(rows), pa.int64())})
        seconds: dict[str, float] = {}
        with _timed(seconds, "load"), self._turn:
            if self._predictor is None:
                self.apply(self.config.choice or self.default_choice())
        with _timed(seconds, "preprocess"):
            prepared = self.preprocess(columns, places, unreadable)
        lengths = np.zeros(rows, np.int64)
        if len(prepared.features):
            lengths[prepared.features[POSITION].to_numpy()] = self.task.lengths(prepared.features)
        with _timed(seconds, "predict"), self._turn:
            if self.task.fits and len(prepared.features):
                self.apply(replace(self.default_choice(), fitted=self._fit(prepared.features, PREVIEW_BATCH)))
            predicted = self.predict(prepared.features, True, follow)
        with _timed(seconds, "postprocess"):
            fields = self.task.fields_for(set(columns))
            positions, arrays, failures = self.postprocess(predicted.outputs, columns, fields)
        rejects = sorted(
            [*prepared.rejects, *predicted.rejects, *failures], key=lambda reject: reject.position
        )
        made = {column.name: array for column, array in zip(fields, arrays, strict=True)}
        return Outcome(positions, made, rejects, prepared.cut, lengths, predicted.stats, seconds)

    def with_params(self, params: Mapping[str, Any]) -> Runner:
        """A runner with other params of the task and the same model; the two take turns.

        :param params: replace those of the same name.
        :raises SpecError: with every fault of the params.
        """
        made = copy(self)
        made.config = replace(self.config, params={**self.config.params, **params})
        made.task, made._predictor = task_with(self.task, made.config), None
        return made

    def default_choice(self) -> RuntimeChoice:
        """What a few rows run in: the variant of the spec, in small batches, without trials."""
        engine = self.engine or self.load()
        size = self.config.batch.size
        if size == "auto":
            small = engine.device.startswith("cpu") and self.task.concurrent
            size = PREVIEW_BATCH_ON_CPU if small else PREVIEW_BATCH
        one = self._variant
        return RuntimeChoice(
            size, engine.dtype, engine.device, engine.name, one.quantization, compiled=one.compiled,
            dedupe=self.config.batch.dedupe, share_prefixes=self.config.batch.share_prefixes,
        )  # fmt: skip

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

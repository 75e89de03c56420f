"""`engine: auto`: tries what is installed on rows of the job, and takes the fastest that agrees with float32."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import pyarrow as pa

from hfbatch.engines import ENGINES
from hfbatch.engines.base import BatchEngine, Engine
from hfbatch.engines.exports import cached_exports
from hfbatch.errors import HfbatchError, WorkerError, one_line
from hfbatch.runtime.guard import Verdict, advice, compare, sample
from hfbatch.runtime.predictor import Predictor
from hfbatch.runtime.prepare import POSITION
from hfbatch.runtime.variants import REFERENCE, Variant, candidates
from hfbatch.spec.engines import AutoEngineSpec
from hfbatch.tasks.base import Task

LEAST_JOB_SECONDS = 120.0
"""Estimated time of a job below which nothing is tried: torch computes it in the native dtype."""
EXPORT_JOB_SECONDS = 300.0
"""The same for models that have to be exported first, which takes 10 to 25 s."""
SHARE, LONG_SHARE = 0.05, 0.02
"""Limits of all trials as shares of the estimated job: the first one up to the seconds of the spec, the other one beyond."""
SECONDS_EACH, LEAST_ROWS, MOST_ROWS = 1.0, 16, 512
"""Time that the first variant computes for, and limits of its rows; the others compute the same rows."""
TRIES = 2
GAIN = 1.05
"""How much faster than the best so far a variant has to be."""


@dataclass(frozen=True)
class EngineTrial:
    """What became of a variant, in plain values."""

    variant: str
    rows_per_s: float | None = None
    note: str = ""
    """The comparison with float32, or why the variant is out."""


@dataclass
class EngineSearch:
    """Tries variants one after the other, and keeps the best.

    :param build: loads a variant, ready for such rows.
    :param rows: rows of the job.
    :param columns: the task's input columns of the whole split.
    :param dtype: of the spec; another than auto is tried alone, without quantisation.
    """

    task: Task
    build: Callable[[Variant], Engine]
    spec: AutoEngineSpec
    features: pa.Table
    rows: int
    columns: Mapping[str, pa.Array]
    dtype: str = "auto"
    engine: Engine | None = None
    """The best engine so far."""
    variant: Variant = REFERENCE
    verdict: Verdict | None = None
    trials: list[EngineTrial] = field(default_factory=list)
    _rate: float = 0.0
    _reference: Engine | None = None

    def run(self, first: Variant, engine: Engine) -> bool:
        """Tries variants until time is up; returns whether any was tried, since a short job does not repay it.

        :param first: what the job runs in if nothing is tried, with its engine.
        :raises WorkerError: if nothing in the dtype that the spec names agrees with float32.
        """
        begun = time.perf_counter()
        if first == REFERENCE:
            self._reference = engine
        some = self._some(engine)
        rate = self._speed(engine, some)
        seconds = self.rows / rate
        if seconds < LEAST_JOB_SECONDS or engine.device.startswith("cuda"):
            return False
        limit = max(min(self.spec.seconds, SHARE * seconds), LONG_SHARE * seconds)
        others = [one for one in candidates(self.task, self.dtype, gpus=True) if one != first]
        for variant in (first, *others):
            if variant != first and time.perf_counter() - begun > limit:
                found = EngineTrial(str(variant), note="not tried: time was up")
            elif seconds < EXPORT_JOB_SECONDS and not self._exported(variant):
                found = EngineTrial(str(variant), note="not tried: the job is too short for an export")
            else:
                found = self._try(variant, some) if variant != first else self._judge(first, engine, rate)
            self.trials.append(found)
        self.engine = self.engine or self._fallback(first)
        return True

    def _fallback(self, first: Variant) -> Engine:
        """Returns float32 in torch where no variant agrees with it. :raises WorkerError: if the spec names another dtype."""
        if self.dtype not in ("auto", "float32"):
            raise WorkerError(f"{self.trials[0].note}. {advice(first)}")
        return self._exact()

    def _try(self, variant: Variant, some: pa.Table) -> EngineTrial:
        """Loads and measures a variant, see `_judge`."""
        try:
            engine = self._exact() if variant == REFERENCE else self.build(variant)
            rate = self._speed(engine, some)
        except HfbatchError as error:
            return EngineTrial(str(variant), note=one_line(error))
        return self._judge(variant, engine, rate)

    def _judge(self, variant: Variant, engine: Engine, rate: float) -> EngineTrial:
        """Compares a variant with float32 if it is the fastest so far; keeps it if it agrees."""
        try:
            if rate < GAIN * self._rate:
                return EngineTrial(str(variant), rate, "not faster")
            # A graph in float32 may fail, or differ, on some rows.
            differs = variant.lowered or variant.engine != REFERENCE.engine
            verdict = self._compare(variant, engine) if differs else None
        except HfbatchError as error:
            return EngineTrial(str(variant), note=one_line(error))
        unknown = verdict and verdict.status == "unguarded" and self.spec.guard.mode != "required"
        if verdict and verdict.status != "passed" and not (unknown and self.engine is None):
            return EngineTrial(str(variant), rate, verdict.summary)
        self.engine, self.variant, self.verdict, self._rate = engine, variant, verdict, rate
        return EngineTrial(str(variant), rate, verdict.summary if verdict else "")

    def _compare(self, variant: Variant, engine: Engine) -> Verdict:
        return compare(
            self.task,
            self._exact,
            engine,
            str(variant),
            self.features,
            self.columns,
            self.spec.guard,
            self.rows,
        )

    def _exact(self) -> Engine:
        """The model in float32 in torch, loaded once: a variant like the others, and what they are compared with."""
        self._reference = self._reference or self.build(REFERENCE)
        return self._reference

    def _some(self, engine: Engine) -> pa.Table:
        """Returns rows spread over the lengths that take about SECONDS_EACH."""
        order = pa.array(sample(self.task.lengths(self.features), MOST_ROWS, self.task.seed))
        rows = self.features.drop_columns([POSITION]).take(order)
        rate = self._speed(engine, rows.slice(0, LEAST_ROWS))
        return rows.slice(0, max(int(rate * SECONDS_EACH), LEAST_ROWS))

    def _speed(self, engine: Engine, rows: pa.Table) -> float:
        """Returns rows per second, of the faster of two tries: other load on the machine can only slow one down."""
        runner = cast(BatchEngine, engine)
        predictor = Predictor(self.task, runner, runner.batch_sizes[0], runner.batch_tokens)
        times = []
        for _ in range(TRIES):
            begun = time.perf_counter()
            predictor.predict(rows)
            times.append(time.perf_counter() - begun)
        return len(rows) / min(times)

    def _exported(self, variant: Variant) -> bool:
        """Whether the variant needs no export, or this machine has one of the model."""
        if not ENGINES[variant.engine].exports:
            return True
        wanted = variant.engine, self.task.model.version, variant.quantization
        return any(
            (key["engine"], key["model"], key.get("quantization", "none")) == wanted
            for key in cached_exports().values()
        )

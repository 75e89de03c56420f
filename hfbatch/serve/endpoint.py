"""A task with its loaded model, in one process: answers rows of several requests together. Does not import Ray."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import numpy as np

from hfbatch.engines.base import Engine, RowEngine
from hfbatch.engines.precision import native_dtype
from hfbatch.errors import SpecError
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.predictor import Follow
from hfbatch.runtime.runner import Runner
from hfbatch.serve.plan import EndpointConfig
from hfbatch.serve.rows import Answer, RequestError, Row, RowReader, to_places
from hfbatch.tasks.base import Task

VARIANTS = 64
"""Sets of params whose tasks are kept."""
OnToken = Callable[[int, int], None]
"""Takes the position of a row, and its next token."""


class Endpoint:
    """Answers rows with the runner that jobs use. Threads may ask at the same time.

    :param config: the settings.
    :param share: the part of this machine's cores that the model may use, 0 to 1.
    """

    def __init__(self, config: EndpointConfig, share: float = 1.0) -> None:
        self.config = config
        self._runner = Runner(_packed(config), share)
        self._runner.load()
        self.task: Task = self._runner.task
        self.rows = RowReader.of(self.task)
        self._with = lru_cache(maxsize=VARIANTS)(self._with_params)

    @property
    def label(self) -> str:
        """Host and device."""
        return self._runner.label

    @property
    def engine(self) -> Engine:
        """What runs the model."""
        return cast(Engine, self._runner.engine)

    @property
    def streams(self) -> bool:
        """Whether texts can be followed while they are generated."""
        if not hasattr(self.task, "follow") or isinstance(self.engine, RowEngine):
            return False
        task: Any = self.task  # with `follow`, and so with `decoding`
        return (task.decoding.num_beams or 1) == 1  # which of the beams is the text shows at its end

    def with_params(self, params: dict[str, Any]) -> str:
        """Returns params as rows name them. :raises RequestError: with the faults of params."""
        text = json.dumps(params, sort_keys=True)
        try:
            self._with(text)
        except SpecError as error:
            raise RequestError(error.faults) from error
        return text

    def _with_params(self, params: str) -> Runner:
        return self._runner.with_params(json.loads(params)) if params != "{}" else self._runner

    def answer(self, rows: Sequence[Row], on_token: OnToken | None = None) -> list[Answer]:
        """Runs rows through all steps, those of equal types and params together.

        :param on_token: called while texts are generated, from another thread.
        """
        alike: dict[tuple[Any, str], list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            alike[row.kinds, row.params].append(place)
        answers: dict[int, Answer] = {}
        for (_, params), places in alike.items():
            follow = _follow(places, on_token) if on_token else None
            made = self._answer_alike([rows[place] for place in places], self._with(params), follow)
            answers.update(zip(places, made, strict=True))
        return [answers[place] for place in range(len(rows))]

    def _answer_alike(self, rows: Sequence[Row], runner: Runner, follow: Follow | None) -> list[Answer]:
        columns, unreadable = self.rows.columns_of(rows)
        done = runner.run(columns, to_places(rows), unreadable, follow)
        index = {int(position): k for k, position in enumerate(done.positions)}
        rejects = {reject.position: reject for reject in done.rejects}
        return [
            Answer(done.columns, index.get(k, -1), int(done.lengths[k]), rejects.get(k))
            for k in range(len(rows))
        ]


def _packed(config: EndpointConfig) -> RunnerConfig:
    """The runner's settings, with packed batches on a CPU where they are to be."""
    runner = config.runner
    if not config.packs or native_dtype()[0] != "cpu":
        return runner
    return replace(runner, engine=runner.engine.model_copy(update={"packing": True}))


def _follow(places: list[int], on_token: OnToken) -> Follow:
    """Reports tokens by the positions of rows among all. One text for each row."""

    def report(positions: np.ndarray, tokens: list[int]) -> None:
        """Reports a step."""
        for position, token in zip(positions.tolist(), tokens, strict=True):
            on_token(places[position], token)

    return report

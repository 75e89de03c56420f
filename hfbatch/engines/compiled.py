"""A transformers model compiled by torch.compile, which runs batches of any number and length of rows."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hfbatch.engines.faithful import difference, kind_of_call, other_shapes, silenced
from hfbatch.errors import HfbatchError, WorkerError, one_line

ROWS, TOKENS = 6, 48
"""Shape of the rows for which the model is compiled. Two dimensions of equal size would be taken for one."""
TOLERANCE, LOWERED = 1e-3, 5e-2
"""Largest difference from the model as it is, in parts of an output's largest value: in float32, and in other dtypes, to which
compiled code rounds less often."""


class Compiled:
    """Stands for the model in a task's `forward`.

    The model is compiled once for each set of inputs, always for the same number and length of rows, so that the code does
    not depend on the batch that comes first. It is never compiled again: a batch that the code does not hold for, such as
    one of a single row, runs in the model as it is. Which of the two runs a batch follows from its shape alone, so that a
    split gives the same bits in every run.
    """

    def __init__(self, model: Any, folder: str) -> None:
        self._model, self._folder = model, folder
        self.config, self.forward, self.device, self.dtype = (
            model.config, model.forward, model.device, model.dtype,
        )  # fmt: skip
        self._takes = inspect.signature(self.forward).parameters
        self._codes: dict[str, Callable[..., Any]] = {}
        self._sizes: dict[str, dict[str, list[int]]] = {}
        self._running, self._quiet = 0, threading.Condition()

    def __call__(self, **inputs: Any) -> Any:
        """Returns what the model returns for these inputs. Called by several threads.

        :raises WorkerError: if the model cannot be compiled, or gets images of several sizes: which of them the code is made
            for would depend on the batch that comes first.
        """
        key, tensors, options = kind_of_call(self._takes, inputs)
        sizes = (
            {} if "input_ids" in tensors else {name: list(value.shape[1:]) for name, value in tensors.items()}
        )
        with self._quiet:
            if (first := self._sizes.setdefault(key, sizes)) != sizes:
                raise WorkerError(
                    f"model {self._folder!r} gets inputs of several sizes, {first} and {sizes}, and the code holds for one; set "
                    "engine.compile=false"
                )
            if key not in self._codes:
                # A compiler changes the state of torch, by which code decides whether it holds: nothing runs meanwhile.
                self._quiet.wait_for(lambda: not self._running)
            if key not in self._codes:  # another thread may have been first
                self._codes[key] = self._compile(tensors, options)
            self._running += 1
        try:
            return self._codes[key](**tensors)
        finally:
            with self._quiet:
                self._running -= 1
                self._quiet.notify_all()

    def _compile(self, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> Callable[..., Any]:
        """Returns the compiled model, once it agrees with the model as it is."""
        model = self._model

        def call(**inputs: torch.Tensor) -> Any:
            """What is compiled."""
            return model(**inputs, **options)

        call.__code__ = (
            call.__code__.replace()
        )  # torch keeps what it compiles with the code object, which closures share
        positions = getattr(self.config, "max_position_embeddings", None)
        sample = _sample(tensors, min(positions or TOKENS, TOKENS))
        call(**sample)  # whose errors are of the rows
        code = torch.compile(call, dynamic=True, fullgraph=True, options=self._settings())
        try:
            with silenced():
                code(**sample)
                # The code must hold for the other shapes too, without being made again.
                with torch.compiler.set_stance("fail_on_recompile"):
                    shapes = sample, *other_shapes(sample, positions)
                    off = [difference(call(**inputs), code(**inputs)) for inputs in shapes]
        except HfbatchError:
            raise
        except Exception as error:  # torch and the compilers raise errors of any class
            raise WorkerError(
                f"model {self._folder!r} cannot be compiled: {one_line(error)}; set engine.compile=false"
            ) from error
        tolerance = TOLERANCE if self.dtype == torch.float32 else LOWERED
        if not all(one <= tolerance for one in off):
            raise WorkerError(
                f"the code that torch.compile made of model {self._folder!r} gives other results (a relative difference of "
                f"{max(off):.2g}); set engine.compile=false"
            )
        return torch._dynamo.run(code)  # type: ignore[no-any-return, no-untyped-call]

    def _settings(self) -> dict[str, Any]:
        """Settings of the compiler.

        Trials of kernels would choose by time, and so make other bits in another run. Weights are frozen where the matrix
        units of CPUs need them in an order of their own; in float32, that made no batch faster, and code with frozen
        weights is cached in part only.
        """
        frozen = self.device.type == "cpu" and self.dtype != torch.float32
        return {"deterministic": True, "compile_threads": 1, "freezing": frozen}


def _sample(tensors: Mapping[str, torch.Tensor], tokens: int) -> dict[str, torch.Tensor]:
    """Returns rows of ROWS and, for texts, `tokens`, by repeating those of a batch."""
    width = tensors["input_ids"].shape[1:] if "input_ids" in tensors else None
    made = {}
    for name, tensor in tensors.items():
        rows = tensor[torch.arange(ROWS) % len(tensor)]
        if width and tensor.shape[1:] == width:
            rows = rows[:, torch.arange(tokens) % width[0]]
        made[name] = rows
    return made

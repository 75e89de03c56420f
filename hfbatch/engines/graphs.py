"""Runs a graph that comes with the model in place of weights, as optimum exports it: inputs and outputs go by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hfbatch.engines.base import EngineConfig
from hfbatch.errors import WorkerError

NEUTRAL = {"attention_mask": 1, "pixel_mask": 1, "token_type_ids": 0}
"""Inputs that change nothing if they have this value everywhere: a graph may do without them, or take them besides."""
ALIASES = {"last_hidden_state": "token_embeddings"}
"""Names in transformers, and those that exports of sentence-transformers have; their `sentence_embedding` is not read."""


@dataclass(frozen=True)
class RawGraph:
    """A graph that an engine has loaded."""

    file: str
    dtype: str
    """What it computes in."""
    takes: Mapping[str, np.dtype[Any]]
    """Its inputs, with their types."""
    gives: Sequence[str]
    """Its outputs, in order."""
    shapes: Mapping[str, Sequence[int | None]]
    """Of inputs and outputs: None for a dimension that varies."""
    run: Callable[[dict[str, np.ndarray]], Sequence[Any]]
    """Maps inputs to outputs, as arrays or tensors."""


class GraphOutput:
    """The outputs of a graph, by the names that transformers gives them."""

    def __init__(self, file: str, values: Mapping[str, torch.Tensor]) -> None:
        self._file, self._values = file, values

    def __getattr__(self, name: str) -> torch.Tensor:
        if name.startswith("__"):
            raise AttributeError(name)
        for known in (name, ALIASES.get(name, name)):
            if known in self._values:
                return self._values[known]
        raise WorkerError(
            f"the graph {self._file} has no output {name!r}, which the task reads (it has: {', '.join(self._values)}); "
            "export the model for this task, or give its safetensors weights"
        )

    def __getitem__(self, key: str | int) -> torch.Tensor:
        """Returns an output. The first one of a model without a head is its last hidden state; other graphs have none."""
        return getattr(self, "last_hidden_state" if key == 0 else str(key))  # type: ignore[no-any-return]


class OwnGraph:
    """Stands for the transformers model in a task's `forward`.

    :raises WorkerError: for a graph that cannot run the batches of a job, or not in the dtype asked for.
    """

    def __init__(self, graph: RawGraph, config: EngineConfig) -> None:
        self.config, self.forward = outline(config)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._graph = graph
        if config.dtype not in ("auto", graph.dtype):
            raise WorkerError(
                f"the graph {graph.file} computes in {graph.dtype}, not in {config.dtype}; leave model.dtype out"
            )
        self._check_shapes(config.auto_class)

    def __call__(self, **inputs: Any) -> GraphOutput:
        """Returns what the graph gives for these inputs.

        :raises WorkerError: if it lacks an input that these say something with, or takes one that they do not have.
        """
        asked = [name for name, value in inputs.items() if not isinstance(value, torch.Tensor) and value]
        if asked:
            raise self._refused(f"cannot be asked for {' and '.join(asked)}")
        graph = self._graph
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        for name, value in tensors.items():
            if name not in graph.takes and not (name in NEUTRAL and (value == NEUTRAL[name]).all()):
                raise self._refused(f"has no input {name!r}, which the model reads")
        like = tensors.get("input_ids")
        for name in graph.takes:
            if name not in tensors:
                if like is None or name not in NEUTRAL:
                    raise self._refused(f"takes {name!r}, which the task does not give")
                tensors[name] = torch.full_like(like, NEUTRAL[name])
        feed = {name: tensors[name].numpy().astype(kind, copy=False) for name, kind in graph.takes.items()}
        values = [
            value if isinstance(value, torch.Tensor) else torch.from_numpy(value) for value in graph.run(feed)
        ]
        return GraphOutput(graph.file, dict(zip(graph.gives, values, strict=True)))

    def _check_shapes(self, auto_class: str) -> None:
        """Checks that rows and tokens may vary, and that each class has a name."""
        graph = self._graph
        for name in graph.takes:
            shape = graph.shapes[name]
            fixed = [size for size in shape[: 2 if len(shape) == 2 else 1] if size is not None]
            if fixed:
                raise self._refused(f"takes {name!r} with a fixed size of {fixed[0]}")
        if "Classification" not in auto_class or "logits" not in graph.gives:
            return
        classes, names = graph.shapes["logits"][-1], len(self.config.id2label or {})
        if classes not in (None, names):
            raise WorkerError(
                f"the graph {graph.file} has {classes} classes, and id2label of config.json names {names}; name each class there"
            )

    def _refused(self, what: str) -> WorkerError:
        return WorkerError(
            f"the graph {self._graph.file} {what}; export the model for this task with variable rows and tokens, or give its "
            "safetensors weights"
        )


def outline(config: EngineConfig) -> tuple[Any, Callable[..., Any]]:
    """Returns a model's config and `forward`, whose signature says what it takes; loads no weights."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = transformers.AutoConfig.from_pretrained(config.folder, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        loader = getattr(transformers, config.auto_class)
        skeleton = loader.from_config(found, trust_remote_code=config.trust_remote_code)
    return found, skeleton.forward

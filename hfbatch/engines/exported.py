"""Base class of engines that run a graph exported from a transformers model, on the CPU."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from hfbatch.engines.base import BatchEngine, EngineConfig, Forward
from hfbatch.engines.exports import cached_export
from hfbatch.engines.faithful import difference, kind_of_call, other_shapes, silenced
from hfbatch.engines.graphs import OwnGraph, RawGraph, outline
from hfbatch.engines.torch import as_array, as_tensor, device_name, is_stateless, load_model
from hfbatch.errors import HfbatchError, WorkerError, one_line

TOLERANCE = 1e-3
"""Largest difference between an output of the graph and of the model in float32, in parts of the output's largest value."""


class ExportedEngine(BatchEngine):
    """Runs a model as a graph, which is exported once for each machine when the first batch shows the inputs.

    Batches run one after another, on all threads of the worker.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.dtype, self.config = config.dtype, config
        self.device = device_name(torch.device("cpu"))
        self.model: Graphs | OwnGraph
        if not config.graph:
            self.model = Graphs(self)
            return
        try:
            graph = self.read(Path(config.folder, config.graph))
        except Exception as error:  # the libraries raise errors of any class
            raise WorkerError(
                f"engine {self.name} cannot read the graph {config.graph} of the model: {one_line(error)}"
            ) from error
        self.model, self.dtype = OwnGraph(graph, config), graph.dtype

    def prepare(self, batch: dict[str, np.ndarray], forward: Forward) -> None:
        """Exports the model for inputs such as those of a batch, and runs the batch."""
        try:
            self.submit(batch, forward)
        except HfbatchError:
            raise
        except Exception as error:
            raise WorkerError(f"engine {self.name} cannot run this model: {one_line(error)}") from error

    def submit(self, batch: dict[str, np.ndarray], forward: Forward) -> Any:
        """Runs a batch to the end."""
        torch.set_num_threads(self.config.threads)
        with torch.inference_mode():
            return forward(self.model, {name: as_tensor(value) for name, value in batch.items()})

    def collect(self, handle: Any) -> dict[str, np.ndarray]:
        """Returns results as NumPy arrays that share memory with the tensors."""
        return {name: as_array(value) for name, value in handle.items()}

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether memory ran out."""
        return isinstance(error, MemoryError) or "alloc" in str(error)

    def release_memory(self) -> None:
        """Does nothing: memory on the CPU is returned when it is freed."""

    quantizer: ClassVar[str]
    """The package that quantises graphs, which graphs in float32 do not depend on."""

    @abstractmethod
    def export(self, model: torch.nn.Module, inputs: dict[str, Any], folder: Path) -> None:
        """Writes the graph of a float32 model, with variable batch and length, to a folder."""

    @abstractmethod
    def quantize(self, program: Any) -> Any:
        """Returns a graph in float32 with weights in 8-bit integers."""

    @abstractmethod
    def open(self, folder: Path, precise: bool = False) -> Any:
        """Loads a graph: a function of the inputs by name that returns the model's `ModelOutput`.

        :param precise: compute in float32, whatever the dtype of the engine.
        """

    @abstractmethod
    def read(self, file: Path) -> RawGraph:
        """Loads a graph that comes with a model."""


class Graphs:
    """Stands for the transformers model in a task's `forward`: runs the graph for the inputs that it is called with."""

    def __init__(self, engine: ExportedEngine) -> None:
        self._engine = engine
        self.config, self.forward = outline(engine.config)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._takes = inspect.signature(self.forward).parameters
        self._graphs: dict[str, Any] = {}
        self.folders: list[Path] = []
        """Of the graphs that have run."""

    def __call__(self, **inputs: Any) -> Any:
        """Returns what the model returns for these inputs.

        :raises WorkerError: if the model cannot be exported.
        """
        key, tensors, options = kind_of_call(self._takes, inputs)
        if key not in self._graphs:
            self._graphs[key] = self._open(tensors, options)
        return self._graphs[key](**tensors)

    def _open(self, tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> Any:
        """Loads the graph for such inputs, exporting the model if this machine does not have it."""
        engine, config = self._engine, self._engine.config

        def quantize(folder: Path) -> None:
            """Writes the graph in integers, from the graph in float32."""
            with silenced():
                graph = engine.open(self._export(tensors, options), precise=True)
                (component,) = graph.components.values()
                component.program = engine.quantize(component.program)
                graph.save_pretrained(folder)

        try:
            if config.quantization == "none":
                folder = self._export(tensors, options)
            else:
                key = self._key(tensors, options) | {"quantization": config.quantization}
                folder = cached_export(key, ("torch", "transformers", *config.packages), quantize)
            graph = engine.open(folder)
        except HfbatchError:
            raise
        except Exception as error:
            raise WorkerError(
                f"model {config.folder!r} cannot be exported for engine {engine.name}: {one_line(error)}; use engine torch"
            ) from error
        self.folders.append(folder)
        return graph

    def _export(self, tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> Path:
        """Returns the folder of the graph in float32, which agrees with the model."""
        engine, config = self._engine, self._engine.config

        def export(folder: Path) -> None:
            """Writes the graph, once it agrees with the model."""
            model = load_model(replace(config, quantization="none"), torch.float32)
            if not is_stateless(model):
                raise WorkerError(
                    f"engine {engine.name} cannot run this model, which computes in another way from some length on; "
                    "use engine torch"
                )
            with torch.inference_mode(False), torch.no_grad(), silenced():
                sample = {name: _several(tensor) for name, tensor in tensors.items()}
                engine.export(model, {**sample, **options}, folder)
                self._check(model, engine.open(folder, precise=True), sample, options)

        packages = [name for name in config.packages if name != engine.quantizer]
        return cached_export(self._key(tensors, options), ("torch", "transformers", *packages), export)

    def _key(self, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
        """What determines the graph in float32, besides the versions of packages."""
        config = self._engine.config
        return {
            "engine": self._engine.name,
            "model": config.commit,
            "auto_class": config.auto_class,
            "vocabulary": config.vocabulary,
            "seed": config.seed,
            "inputs": sorted(tensors),
            "options": dict(options),
            "quantization": "none",
        }

    def _check(
        self,
        model: torch.nn.Module,
        graph: Any,
        sample: Mapping[str, torch.Tensor],
        options: Mapping[str, Any],
    ) -> None:
        """Compares the graph with the model on the inputs of the export, and on more rows, shorter and longer ones.

        :raises WorkerError: if they differ.
        """
        for inputs in (sample, *other_shapes(sample, getattr(self.config, "max_position_embeddings", None))):
            wanted, found = model(**inputs, **options), graph(**inputs)
            off = difference(wanted, found)
            if not off <= TOLERANCE:
                raise WorkerError(
                    f"the graph that engine {self._engine.name} made of this model gives other results (a relative "
                    f"difference of {off:.2g}); use engine torch"
                )


def _several(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy with at least two rows: an export would take a dimension of one for a constant."""
    return (torch.cat([tensor, tensor]) if len(tensor) == 1 else tensor).clone()

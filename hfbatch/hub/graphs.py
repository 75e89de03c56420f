"""Finds and checks the graphs of a model: ONNX and OpenVINO files that take the place of weights. Opens none of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path

from hfbatch.hub.jsonfiles import is_pointer, pointer_fault

GRAPHS = {"openvino": "openvino_model.xml", "onnx": "model.onnx"}
"""Name of the graph that each engine runs, as optimum and the exporters of transformers write it."""
FOLDERS = ("", "onnx/", "openvino/")
"""Where it is looked for: beside config.json, then where optimum and sentence-transformers put it on the Hub."""
DATA = {"openvino": "openvino_model.bin", "onnx": "model.onnx[._]data*"}
"""Patterns of the files beside it that hold the weights: of an OpenVINO graph always, of an ONNX one if it is large."""


def own_graphs(names: Collection[str]) -> dict[str, str]:
    """Returns the graphs of a model without safetensors weights, by the engine that runs them; none of other models.

    :param names: names of the model's files.
    """
    if any(name.endswith(".safetensors") and "/" not in name for name in names):
        return {}
    found = {
        engine: [inner + file for inner in FOLDERS if inner + file in names]
        for engine, file in GRAPHS.items()
    }
    return {engine: files[0] for engine, files in found.items() if files}


def graph_patterns(graphs: Mapping[str, str]) -> list[str]:
    """Returns patterns of the names of all files of these graphs."""
    return [
        inner + pattern
        for engine, file in graphs.items()
        for inner in [file.removesuffix(GRAPHS[engine])]
        for pattern in (GRAPHS[engine], DATA[engine])
    ]


def files_of(graphs: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """Returns which of a model's files belong to these graphs."""
    patterns = graph_patterns(graphs)
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def graph_faults(
    model: str, graphs: Mapping[str, str], names: Collection[str], folder: Path | None = None
) -> list[str]:
    """Checks the files of graphs; returns their faults.

    :param model: name of the model, for errors.
    :param names: names of the model's files.
    :param folder: where they are, if they are on this machine.
    """
    file = graphs.get("openvino", "")
    weights = file.removesuffix(".xml") + ".bin"
    if file and weights not in names:
        return [f"model {model!r}: {weights}, the weights of {file}, is missing; download the model again"]
    here = [name for name in files_of(graphs, names) if folder and (folder / name).is_file()]
    return [pointer_fault(model, name) for name in here if folder and is_pointer(folder / name)]


def graph_alone_fault(model: str, graphs: Mapping[str, str]) -> str:
    """Returns the fault of a model that has graphs and no weights, where weights are needed."""
    engines = " or ".join(f"engine: {engine}" for engine in graphs)
    return (
        f"model {model!r} has no safetensors weights: its weights are a graph ({' and '.join(graphs.values())}), which "
        f"{engines} runs as it is"
    )

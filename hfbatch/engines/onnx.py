"""The ONNX engine: a graph of the model in float32 or 8-bit integers with ONNX Runtime, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hfbatch.engines.exported import ExportedEngine
from hfbatch.engines.graphs import RawGraph

QUANTIZED = ["MatMul", "Attention", "Gather"]
"""Operations whose weights are quantised: convolutions would get one scale for all channels."""


class OnnxEngine(ExportedEngine):
    """Runs graphs with ONNX Runtime."""

    name = "onnx"
    quantizer = "onnx"

    def export(self, model: Any, inputs: dict[str, Any], folder: Path) -> None:
        """Writes `model.onnx`, with operations of ONNX Runtime for groups of the model's."""
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        config = OnnxConfig(dynamic=True, ort_fusions="cpu")
        OnnxExporter().export(model, inputs, config).save_pretrained(folder)

    def quantize(self, program: Any) -> Any:
        """Quantises weights for each output channel; activations are quantised when they are multiplied, so no rows are needed.

        Weights take 7 of the 8 bits: CPUs without VNNI add two products in 16 bits, which overflow with 8.
        """
        from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer
        from transformers.exporters.configs import ExportFormat

        config = OnnxRuntimeDynamicConfig(op_types_to_quantize=QUANTIZED, per_channel=True, reduce_range=True)
        return OnnxRuntimeQuantizer(config).quantize(program, {}, ExportFormat.ONNX)

    def open(self, folder: Path, precise: bool = False) -> Any:
        """Loads a graph."""
        from transformers.exporters import ExportedModel

        return ExportedModel.from_pretrained(folder, device="cpu", session_options=self._options())

    def read(self, file: Path) -> RawGraph:
        """Loads the graph of a model. ONNX Runtime refuses weights in files outside the graph's own folder."""
        import onnxruntime

        session = onnxruntime.InferenceSession(file, self._options(), providers=["CPUExecutionProvider"])
        inputs, outputs = session.get_inputs(), session.get_outputs()
        names = [one.name for one in outputs]
        return RawGraph(
            file.name,
            "float16" if "tensor(float16)" in {one.type for one in outputs} else "float32",
            {one.name: _type(one.type) for one in inputs},
            names,
            {
                one.name: [size if isinstance(size, int) else None for size in one.shape]
                for one in (*inputs, *outputs)
            },
            lambda feed: session.run(names, feed),
        )

    def _options(self) -> Any:
        """Settings of a graph. The threads are always stated: ONNX Runtime would take all cores of the machine."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.config.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are raised, and would be printed besides
        return options


def _type(name: str) -> np.dtype[Any]:
    """Returns the NumPy type of an input such as `tensor(int64)`."""
    plain = name.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(plain, plain))

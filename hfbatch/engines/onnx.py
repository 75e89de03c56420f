"""The ONNX engine: a graph of the model in float32 with ONNX Runtime, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfbatch.engines.exported import ExportedEngine


class OnnxEngine(ExportedEngine):
    """Runs graphs with ONNX Runtime."""

    name = "onnx"

    def export(self, model: Any, inputs: dict[str, Any], folder: Path) -> None:
        """Writes `model.onnx`, with operations of ONNX Runtime for groups of the model's."""
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        config = OnnxConfig(dynamic=True, ort_fusions="cpu")
        OnnxExporter().export(model, inputs, config).save_pretrained(folder)

    def open(self, folder: Path, precise: bool = False) -> Any:
        """Loads a graph. The threads are always stated: ONNX Runtime would take all cores of the machine."""
        import onnxruntime
        from transformers.exporters import ExportedModel

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.config.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are raised, and would be printed besides
        return ExportedModel.from_pretrained(folder, device="cpu", session_options=options)

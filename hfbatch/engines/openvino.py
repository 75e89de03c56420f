"""The OpenVINO engine: a graph of the model in float32 or bfloat16, on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hfbatch.engines.exported import ExportedEngine

# OpenVINO reports its import and each conversion to Google Analytics unless this package is missing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


class OpenVINOEngine(ExportedEngine):
    """Runs graphs with OpenVINO, which converts the weights to the dtype when it loads them."""

    name = "openvino"

    def export(self, model: Any, inputs: dict[str, Any], folder: Path) -> None:
        """Writes `openvino_model.xml` and `.bin`."""
        from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

        OpenVINOExporter().export(model, inputs, OpenVINOConfig(dynamic=True)).save_pretrained(folder)

    def open(self, folder: Path, precise: bool = False) -> Any:
        """Loads a graph. The precision is always stated: OpenVINO would choose bfloat16 by itself."""
        from transformers.exporters import ExportedModel

        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if self.dtype == "bfloat16" and not precise else "f32",
            "INFERENCE_NUM_THREADS": self.config.threads,
            "NUM_STREAMS": 1,
        }
        return ExportedModel.from_pretrained(folder, device="cpu", config=options)

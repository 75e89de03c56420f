"""The OpenVINO engine: a graph of the model in float32, bfloat16 or 8-bit integers, on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hfbatch.engines.exported import ExportedEngine

# OpenVINO and NNCF report their import and each conversion to Google Analytics unless this package is missing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

GROUP = 128
"""Values of an activation that share a scale in a product with 8-bit weights: the fastest size, and a divisor of most models' widths."""


class OpenVINOEngine(ExportedEngine):
    """Runs graphs with OpenVINO, which converts the weights to the dtype when it loads them."""

    name = "openvino"
    quantizer = "nncf"

    def export(self, model: Any, inputs: dict[str, Any], folder: Path) -> None:
        """Writes `openvino_model.xml` and `.bin`."""
        from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

        OpenVINOExporter().export(model, inputs, OpenVINOConfig(dynamic=True)).save_pretrained(folder)

    def quantize(self, program: Any) -> Any:
        """Quantises weights for each output channel; activations are quantised when they are multiplied, so no rows are needed."""
        import nncf

        return nncf.compress_weights(program, mode=nncf.CompressWeightsMode.INT8_SYM)

    def open(self, folder: Path, precise: bool = False) -> Any:
        """Loads a graph. The precision is always stated: OpenVINO would choose bfloat16 by itself."""
        from transformers.exporters import ExportedModel

        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if self.dtype == "bfloat16" and not precise else "f32",
            "INFERENCE_NUM_THREADS": self.config.threads,
            "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,  # of graphs with 8-bit weights; others have nothing to quantise
        }
        return ExportedModel.from_pretrained(folder, device="cpu", config=options)

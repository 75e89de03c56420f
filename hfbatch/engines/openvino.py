"""The OpenVINO engine: a graph of the model in float32, bfloat16 or 8-bit integers, on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hfbatch.engines.base import EngineConfig
from hfbatch.engines.exported import ExportedEngine
from hfbatch.engines.graphs import RawGraph
from hfbatch.errors import WorkerError

# OpenVINO and NNCF report their import and each conversion to Google Analytics unless this package is missing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

GROUP = 128
"""Values of an activation that share a scale in a product with 8-bit weights: the fastest size, and a divisor of most models' widths."""


class OpenVINOEngine(ExportedEngine):
    """Runs graphs with OpenVINO, which converts the weights to the dtype when it loads them."""

    name = "openvino"
    quantizer = "nncf"

    def __init__(self, config: EngineConfig) -> None:
        # OpenVINO would silently compute in float32, so that the results of two machines would differ.
        if config.dtype == "bfloat16" and not computes_in_bfloat16():
            raise WorkerError(
                "engine openvino does not compute in bfloat16 on this CPU; set model.dtype to float32, "
                "or use machines whose CPUs have AVX-512 or AMX"
            )
        super().__init__(config)

    def export(self, model: Any, inputs: dict[str, Any], folder: Path) -> None:
        """Writes `openvino_model.xml` and `.bin`."""
        from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

        OpenVINOExporter().export(model, inputs, OpenVINOConfig(dynamic=True)).save_pretrained(folder)

    def quantize(self, program: Any) -> Any:
        """Quantises weights for each output channel; activations are quantised when they are multiplied, so no rows are needed."""
        import nncf

        return nncf.compress_weights(program, mode=nncf.CompressWeightsMode.INT8_SYM)

    def open(self, folder: Path, precise: bool = False) -> Any:
        """Loads a graph."""
        from transformers.exporters import ExportedModel

        return ExportedModel.from_pretrained(folder, device="cpu", config=self._options(precise))

    def read(self, file: Path) -> RawGraph:
        """Loads the graph of a model: the `.xml`, and the weights in the `.bin` beside it."""
        import openvino
        from transformers.exporters.runners.runner_openvino import openvino_output_tensor

        core = openvino.Core()
        latency = {"PERFORMANCE_HINT": "LATENCY"}  # as for graphs that are exported here
        model = core.compile_model(
            core.read_model(file, file.with_suffix(".bin")), "CPU", latency | self._options()
        )
        request, outputs = model.create_infer_request(), model.outputs

        def run(feed: dict[str, Any]) -> list[Any]:
            """Computes a batch."""
            found = request.infer(feed, share_inputs=True)
            return [openvino_output_tensor(found[port], port) for port in outputs]

        return RawGraph(
            file.name,
            self.dtype if self.dtype == "bfloat16" else "float32",
            {port.get_any_name(): port.get_element_type().to_dtype() for port in model.inputs},
            [_name(port, at) for at, port in enumerate(outputs)],
            {
                _name(port, at): _shape(port)
                for ports in (model.inputs, outputs)
                for at, port in enumerate(ports)
            },
            run,
        )

    def _options(self, precise: bool = False) -> dict[str, Any]:
        """Settings of a graph. The precision is always stated: OpenVINO would choose bfloat16 by itself."""
        return {
            "INFERENCE_PRECISION_HINT": "bf16" if self.dtype == "bfloat16" and not precise else "f32",
            "INFERENCE_NUM_THREADS": self.config.threads,
            "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,  # of graphs with 8-bit weights; others have nothing to quantise
        }


def computes_in_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _name(port: Any, at: int) -> str:
    """Returns the name of an input or output; some outputs have none."""
    return port.get_any_name() if port.get_names() else f"output {at}"


def _shape(port: Any) -> list[int | None]:
    """Returns the dimensions of an input or output; None for those that vary."""
    shape = port.get_partial_shape()
    return (
        [None if size.is_dynamic else size.get_length() for size in shape] if shape.rank.is_static else [None]
    )

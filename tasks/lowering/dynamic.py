"""Dynamic quantization by ONNX Runtime's own tool: int8 weights, and activations that find their range as they come."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic

from jetway.tasks.errors import ExportError
from jetway.tasks.onnx_graph import Graph


def quantize_dynamically(graph: Graph) -> Graph:
    """The graph with MatMulInteger and ConvInteger behind DynamicQuantizeLinear, wherever weights are constants.

    Weights are unsigned, as the CPU provider has no ConvInteger for signed ones. Raises ExportError when the tool
    fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dynamic.onnx"
        # It advises on the root logger to prepare the graph, which the exporter has done.
        logging.disable(logging.WARNING)
        try:
            quantize_dynamic(graph.to_model(), path, weight_type=QuantType.QUInt8)
        except Exception as exc:  # the tool has no exceptions of its own
            raise ExportError(
                f"ONNX Runtime cannot quantize this graph dynamically: {type(exc).__name__}: {exc}. Leave the "
                "int8-dynamic variant out, or calibrate (int8-ptq)."
            ) from exc
        finally:
            logging.disable(logging.NOTSET)
        return Graph.load(path)

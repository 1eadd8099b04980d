"""Ranges of tensors: what quantizers already said, and what a float run over calibration data shows."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from onnx import helper

from jetway.tasks.onnx_graph import INT8_MAX, Array, Graph

UINT8_MAX = 255
_TINY = 1e-8


@dataclass(frozen=True)
class Affine:
    """uint8 quantization of a tensor: ``value = (integer - zero_point) * scale``."""

    scale: float
    zero_point: int


def symmetric(magnitude: float) -> Affine:
    """The grid of symmetric int8, moved to uint8: the same values, bit for bit."""
    return Affine(max(magnitude, _TINY) / INT8_MAX, 128)


def non_negative(upper: float) -> Affine:
    """All 256 levels for values from 0 on, so that saturation does what ReLU does."""
    return Affine(max(upper, _TINY) / UINT8_MAX, 0)


def steps_of_int8(upper: float) -> Affine:
    """The grid of symmetric int8 from 0 on; it goes on behind ``upper``, where int8 would saturate."""
    return Affine(max(upper, _TINY) / INT8_MAX, 0)


def between(lower: float, upper: float) -> Affine:
    lower, upper = min(lower, 0.0), max(upper, 0.0, lower + _TINY)
    scale = (upper - lower) / UINT8_MAX
    return Affine(scale, int(np.clip(round(-lower / scale), 0, UINT8_MAX)))


def observe_ranges(
    graph: Graph, names: Iterable[str], feeds: Iterable[dict[str, Array]], *, threads: int = 1
) -> dict[str, tuple[float, float]]:
    """Least and largest value of each tensor over the feeds, run by ONNX Runtime in float."""
    wanted = list(names)
    if not wanted:
        return {}
    session = _float_session(graph, wanted, threads)
    found: dict[str, tuple[float, float]] = {}
    for feed in feeds:
        for name, array in zip(wanted, session.run(wanted, feed), strict=True):
            lower, upper = found.get(name, (np.inf, -np.inf))
            found[name] = (min(lower, float(array.min())), max(upper, float(array.max())))
    return found


def _float_session(graph: Graph, names: list[str], threads: int) -> Any:
    """A session that hands out inner tensors. Optimization would fuse them away, and quantize on its own."""
    watched = deepcopy(graph)
    types = watched.element_types()
    present = set(watched.output_names)
    watched.outputs += [
        helper.make_tensor_value_info(name, types[name], None) for name in names if name not in present
    ]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    model = watched.to_model().SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

"""The canary: a small fixed network that tells whether the machine, not a variant, has become slower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from jetway.tasks.artifacts import OnnxModel, Tensors
from jetway.tasks.store import Store

CHANNELS = 32
SIZE = 32
LAYERS = 3
# As old as the oldest ONNX Runtime that a Python 3.6 target can have.
OPSET = 11
IR_VERSION = 6
SEED = 20260101


def canary_onnx(store: Store) -> OnnxModel:
    """Three 3×3 convolutions of 32 channels on 32×32: 28 million MACs, in the caches of any CPU.

    The same bytes everywhere and always, so sessions of different days and targets can be compared by it.
    """
    rng = np.random.default_rng(SEED)
    weights = [numpy_helper.from_array(_weight(rng), name=f"weight_{layer}") for layer in range(LAYERS)]
    nodes = [
        helper.make_node(
            "Conv",
            [f"x_{layer}", f"weight_{layer}"],
            [f"x_{layer + 1}"],
            name=f"conv_{layer}",
            pads=[1, 1, 1, 1],
        )
        for layer in range(LAYERS)
    ]
    shape = [1, CHANNELS, SIZE, SIZE]
    graph = helper.make_graph(
        nodes,
        "canary",
        [helper.make_tensor_value_info("x_0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"x_{LAYERS}", TensorProto.FLOAT, shape)],
        initializer=weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    with store.scratch() as folder:
        path = Path(folder) / "canary.onnx"
        onnx.save(model, path)
        return store.add(OnnxModel, path, metadata={"opset": OPSET, "precision": "fp32"})


def canary_inputs(store: Store) -> Tensors:
    from safetensors.numpy import save_file

    values = np.random.default_rng(SEED).standard_normal((1, CHANNELS, SIZE, SIZE), dtype=np.float32)
    with store.scratch() as folder:
        path = folder / "inputs.safetensors"
        save_file({"x_0": values}, path)
        return store.add(Tensors, path)


def _weight(rng: np.random.Generator) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Scaled so that the values keep their size from layer to layer."""
    weight = rng.standard_normal((CHANNELS, CHANNELS, 3, 3), dtype=np.float32)
    return weight / np.float32(np.sqrt(CHANNELS * 9))

"""A chain of equal convolutions: how many there are sets how long an engine takes, to the share of one layer."""

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from jetway.configs.schema import BuildConfig
from jetway.tasks.artifacts import OnnxModel
from jetway.tasks.build import build_engine
from jetway.tasks.workload import Workload

CHANNELS, SIZE, OPSET, IR_VERSION = 32, 16, 17, 8
SHAPE = [1, CHANNELS, SIZE, SIZE]


class ChainWorkload(Workload):
    """Inputs for chains of any length; nothing is trained or scored."""

    def network(self):
        return nn.Identity()

    def example_inputs(self):
        return {"x_0": torch.randn(SHAPE)}

    def train_data(self):
        return []

    calibration_data = evaluation_data = train_data

    def loss(self, outputs, target):
        return torch.zeros(())


def build_chain(context, session, layers):
    """The chain's engine on the session's target."""
    return build_engine(context, session, chain_onnx(context.store, layers), BuildConfig(threads=1))


def chain_onnx(store, layers):
    """So many 3×3 convolutions of 32 channels on 16×16, 2.4 million MACs each."""
    weight = np.random.default_rng(0).standard_normal((CHANNELS, CHANNELS, 3, 3), dtype=np.float32)
    weight /= np.float32(np.sqrt(CHANNELS * 9))
    nodes = [
        helper.make_node("Conv", [f"x_{i}", "weight"], [f"x_{i + 1}"], name=f"conv_{i}", pads=[1, 1, 1, 1])
        for i in range(layers)
    ]
    ends = [helper.make_tensor_value_info(f"x_{i}", TensorProto.FLOAT, SHAPE) for i in (0, layers)]
    weights = [numpy_helper.from_array(weight, name="weight")]
    graph = helper.make_graph(nodes, f"chain of {layers}", ends[:1], ends[1:], initializer=weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    with store.scratch() as folder:
        path = folder / "chain.onnx"
        onnx.save(model, path)
        return store.add(OnnxModel, path, metadata={"opset": OPSET, "precision": "fp32"})

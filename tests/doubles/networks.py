"""One small network as ONNX files, once for each precision that a file can carry, and inputs for it."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

FLOATS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
CHANNELS, CLASSES = 4, 10


class Network:
    """A stem, a residual block and a head on ``image`` [batch, 1, 8, 8]; gives ``logits`` and the integer ``label``.

    Inputs and outputs are float32 whatever it carries. ``int8`` has Q/DQ before each convolution and the head.
    """

    def __init__(self, precision: str, batch: int | str) -> None:
        self.precision, self.batch = precision, batch
        self.float_type = FLOATS.get(precision, TensorProto.FLOAT)
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def model(self) -> onnx.ModelProto:
        image = self.cast("image", "image_in", self.float_type)
        stem = self.relu(self.convolution(image, "stem", 1))
        body = self.add("Add", [self.convolution(stem, "body", CHANNELS), stem], "residual")
        pooled = self.add("GlobalAveragePool", [self.relu(body)], "pool")
        flat = self.add("Flatten", [pooled], "flat")
        head = self.weight("head.weight", (CLASSES, CHANNELS))
        logits = self.add("Gemm", [self.quantized(flat, "flat"), head], "head", transB=1)
        self.cast(logits, "logits", TensorProto.FLOAT, always=True)
        self.add("ArgMax", ["logits"], "label", axis=1, keepdims=0)
        return self.assembled()

    def assembled(self) -> onnx.ModelProto:
        shapes = {"image": [self.batch, 1, 8, 8], "logits": [self.batch, CLASSES], "label": [self.batch]}
        types = {"image": TensorProto.FLOAT, "logits": TensorProto.FLOAT, "label": TensorProto.INT64}
        values = {name: helper.make_tensor_value_info(name, types[name], shapes[name]) for name in shapes}
        graph = helper.make_graph(
            self.nodes, "small", [values["image"]], [values["logits"], values["label"]], self.weights
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    def add(self, operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output

    def cast(self, value: str, output: str, to: int, *, always: bool = False) -> str:
        if self.float_type == TensorProto.FLOAT:
            return self.add("Identity", [value], output) if always else value
        return self.add("Cast", [value], output, to=to)

    def relu(self, value: str) -> str:
        return self.add("Relu", [value], value + "_relu")

    def convolution(self, value: str, name: str, channels: int) -> str:
        weight = self.weight(f"{name}.weight", (CHANNELS, channels, 3, 3))
        return self.add("Conv", [self.quantized(value, name + "_in"), weight], name, pads=[1, 1, 1, 1])

    def weight(self, name: str, shape: tuple[int, ...]) -> str:
        values = self.random.standard_normal(shape).astype(np.float32) / 2
        self.weights.append(self.stored(values, name))
        if self.precision != "int8":
            return name
        scales = np.abs(values.reshape(shape[0], -1)).max(axis=1) / 127
        return self.quantize_dequantize(name, scales.astype(np.float32), axis=0)

    def stored(self, values: np.ndarray, name: str) -> onnx.TensorProto:
        """As raw bytes where numpy has the type: only those can go to a file of their own."""
        if self.precision == "bf16":
            return helper.make_tensor(name, self.float_type, values.shape, values.flatten().tolist())
        return numpy_helper.from_array(
            values.astype(np.float16 if self.precision == "fp16" else np.float32), name
        )

    def quantized(self, value: str, name: str) -> str:
        if self.precision != "int8":
            return value
        return self.quantize_dequantize(value, np.array(0.05, dtype=np.float32), label=name)

    def quantize_dequantize(self, value: str, scale: np.ndarray, label: str = "", **attributes: int) -> str:
        label = label or value
        constants = {"scale": scale, "zero": np.zeros(scale.shape, dtype=np.int8)}
        names = [f"{label}.{kind}" for kind in constants]
        self.weights += [
            numpy_helper.from_array(array, f"{label}.{kind}") for kind, array in constants.items()
        ]
        integers = self.add("QuantizeLinear", [value, *names], label + "_q", **attributes)
        return self.add("DequantizeLinear", [integers, *names], label + "_dq", **attributes)


def write_networks(folder: Path) -> dict[str, str]:
    """Paths of ``fp32``, ``fp16``, ``bf16`` and ``int8`` (batch of one), ``open`` (any batch), ``external`` (fp32
    with its weights in a file beside it)."""
    paths = {}
    for name in ("fp32", "fp16", "bf16", "int8", "open", "external"):
        model = Network(
            "fp32" if name in ("open", "external") else name, "batch" if name == "open" else 1
        ).model()
        paths[name] = str(folder / f"{name}.onnx")
        onnx.save(
            model, paths[name], save_as_external_data=name == "external", location="weights", size_threshold=0
        )
    return paths


def write_images(path: Path, count: int, seed: int = 1) -> str:
    images = np.random.default_rng(seed).standard_normal((count, 1, 8, 8), dtype=np.float32)
    save_file({"image": images}, path)
    return str(path)

"""Export: names, shapes, Q/DQ and bytes of the ONNX file, and what cannot be exported."""

import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from jetway.configs.schema import ExportConfig, Precision, QatConfig
from jetway.tasks.checkpoint import save_checkpoint
from jetway.tasks.errors import ConfigError, ExportError
from jetway.tasks.export import export_onnx
from jetway.tasks.qat import quantize_ptq
from jetway.tasks.workload import Workload
from jetway.tasks.workloads.digits import DigitsClassifier

SMALL = {"size": 16, "widths": (16, 16, 32), "blocks": 1}


class Brought(Workload):
    """Any network with any inputs; enough of a workload to be exported."""

    def __init__(self, network, inputs, outputs=("output",)):
        self.made, self.inputs, self.output_names = network, inputs, outputs

    def network(self):
        return self.made

    def example_inputs(self):
        return self.inputs

    def train_data(self):
        return [({name: tensor[0] for name, tensor in self.inputs.items()}, 0)] * 4

    calibration_data = evaluation_data = train_data

    def loss(self, outputs, target):
        return outputs[self.output_names[0]].sum()


@pytest.fixture
def ctx(make_context, tmp_path):
    return make_context(DigitsClassifier(**SMALL), tmp_path)


def exported(ctx, config=ExportConfig(), precision=Precision.FP32):  # noqa: B008
    checkpoint = save_checkpoint(ctx.store, ctx.workload.network().eval(), structure=None)
    if precision is not Precision.FP32:
        checkpoint = quantize_ptq(ctx, checkpoint, QatConfig(calibration_samples=16)).handle
    return export_onnx(ctx, checkpoint, config, precision).handle


def model_of(ctx, handle):
    return onnx.load(ctx.store.open(handle))


def run(ctx, handle, inputs):
    session = onnxruntime.InferenceSession(str(ctx.store.open(handle)), providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})


def shape_of(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


class TwoInTwoOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, tokens, scale):
        hidden = self.embed(tokens).mean(1) * scale
        return {"extra": hidden * 2, "hidden": hidden, "logits": self.linear(hidden)}


def test_export_carries_the_names_and_dtypes_of_the_workload(make_context, tmp_path):
    inputs = {"tokens": torch.randint(0, 5, (2, 6)), "scale": torch.rand(2, 1)}
    workload = Brought(TwoInTwoOut().eval(), inputs, ("logits", "hidden"))
    ctx = make_context(workload, tmp_path)
    handle = exported(ctx)
    graph = model_of(ctx, handle).graph
    assert [(v.name, v.type.tensor_type.elem_type, shape_of(v)) for v in graph.input] == [
        ("tokens", onnx.TensorProto.INT64, [2, 6]),
        ("scale", onnx.TensorProto.FLOAT, [2, 1]),
    ]
    assert [v.name for v in graph.output] == ["logits", "hidden"]
    with torch.no_grad():
        expected = workload.made(*inputs.values())
    logits, hidden = run(ctx, handle, inputs)
    np.testing.assert_allclose(logits, expected["logits"].numpy(), atol=1e-5)
    np.testing.assert_allclose(hidden, expected["hidden"].numpy(), atol=1e-5)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8_PTQ])
def test_export_leaves_the_batch_open_when_asked(ctx, precision):
    handle = exported(ctx, ExportConfig(dynamic_batch=True), precision)
    graph = model_of(ctx, handle).graph
    assert shape_of(graph.input[0]) == ["batch", 1, 16, 16]
    assert shape_of(graph.output[0]) == ["batch", 10]
    for batch in (1, 3):
        assert run(ctx, handle, {"image": torch.zeros(batch, 1, 16, 16)})[0].shape == (batch, 10)


def test_export_fixes_the_batch_otherwise(ctx):
    handle = exported(ctx)
    assert shape_of(model_of(ctx, handle).graph.input[0]) == [1, 1, 16, 16]
    assert handle.metadata["inputs"] == {"image": [1, 1, 16, 16]}


@pytest.mark.parametrize("opset", [13, 17, 20])
def test_export_writes_the_opset_of_the_recipe(ctx, opset):
    handle = exported(ctx, ExportConfig(opset=opset), Precision.INT8_PTQ)
    model = model_of(ctx, handle)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert handle.metadata["opset"] == opset
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8_PTQ])
def test_export_gives_the_same_bytes_again(ctx, precision):
    checkpoint = save_checkpoint(ctx.store, ctx.workload.network(), structure=None)
    if precision is Precision.INT8_PTQ:
        checkpoint = quantize_ptq(ctx, checkpoint, QatConfig()).handle
    first, second = (export_onnx(ctx, checkpoint, ExportConfig(), precision).handle for _ in range(2))
    assert first == second


def test_export_of_int8_has_explicit_qdq_int8_weights_and_no_batchnorm(ctx):
    floating, quantized = exported(ctx), exported(ctx, precision=Precision.INT8_PTQ)
    graph = model_of(ctx, quantized).graph
    operators = [node.op_type for node in graph.node]
    layers = operators.count("Conv") + operators.count("Gemm")
    assert layers == 10
    assert operators.count("QuantizeLinear") == layers
    assert operators.count("DequantizeLinear") == 2 * layers
    assert operators.count("BatchNormalization") == 0
    assert quantized.metadata["batchnorms_folded"] == 9
    weights = [t for t in graph.initializer if len(t.dims) > 1]
    assert len(weights) == layers
    assert {t.data_type for t in weights} == {onnx.TensorProto.INT8}
    assert quantized.size_bytes < floating.size_bytes
    assert quantized.metadata["macs"] == floating.metadata["macs"]


def test_export_of_float_folds_batchnorm_too(ctx):
    graph = model_of(ctx, exported(ctx)).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}


@pytest.mark.parametrize("opset", [21, 23])
def test_export_refuses_an_opset_that_it_cannot_write(ctx, opset):
    with pytest.raises(ConfigError, match=r"export\.opset.*20"):
        exported(ctx, ExportConfig().model_copy(update={"opset": opset}))


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.odd = nn.Linear(4, 4), Bessel()

    def forward(self, x):
        return self.odd(self.first(x))


def test_export_names_the_operator_that_onnx_lacks_and_its_module(make_context, tmp_path, capfd):
    ctx = make_context(Brought(Strange(), {"x": torch.zeros(1, 4)}), tmp_path)
    with pytest.raises(ExportError, match=r"bessel_j0.*used in odd.*other operators"):
        exported(ctx)
    assert capfd.readouterr() == ("", "")


class Eager(nn.Module):
    def forward(self, x):
        if torch.jit.is_tracing():
            raise NotImplementedError("this network runs eagerly only")
        return x


def test_export_says_why_a_network_cannot_be_traced(make_context, tmp_path):
    ctx = make_context(Brought(Eager(), {"x": torch.zeros(1, 4)}), tmp_path)
    with pytest.raises(ExportError, match=r"cannot be traced into ONNX: NotImplementedError.*eagerly only"):
        exported(ctx)


def test_export_is_silent(ctx, capfd):
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        exported(ctx, precision=Precision.INT8_PTQ)
    assert [str(warning.message) for warning in raised] == []
    assert capfd.readouterr() == ("", "")

"""Q/DQ as TensorRT takes them: the same integers, skips in int8, layers taken out by name."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from jetway.configs.schema import Precision, TensorRtConfig
from jetway.tasks.errors import ConfigError, ExportError
from jetway.tasks.lowering.for_tensorrt import check_quantizers, expand_weights, lower_for_tensorrt
from jetway.tasks.onnx_graph import Graph

INT8 = Precision.INT8_PTQ
CHANNELS = 8


class Builder:
    """A graph as the export leaves it: Q/DQ on the input and the weight of every layer."""

    def __init__(self, opset=17):
        self.rng = np.random.default_rng(0)
        self.nodes, self.constants, self.opset = [], {}, opset

    def add(self, operator, *inputs, output=None, **attributes):
        output = output or f"t{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(operator, list(inputs), [output], name=f"{operator}_{output}", **attributes)
        )
        return output

    def constant(self, value):
        name = f"k{len(self.constants)}"
        self.constants[name] = value
        return name

    def quantize(self, tensor, magnitude=4.0, zero=0):
        parameters = [
            self.constant(np.array(magnitude / 127, np.float32)),
            self.constant(np.array(zero, np.int8)),
        ]
        return self.add("DequantizeLinear", self.add("QuantizeLinear", tensor, *parameters), *parameters)

    def convolution(self, source, name, quantized=True):
        integers = self.rng.integers(-128, 128, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8)
        scales = (self.rng.random(CHANNELS) * 1e-3 + 1e-5).astype(np.float32)
        bias = self.constant(self.rng.standard_normal(CHANNELS).astype(np.float32))
        if quantized:
            stored = [self.constant(v) for v in (integers, scales, np.zeros(CHANNELS, np.int8))]
            weight = self.add("DequantizeLinear", *stored, axis=0)
            source = self.quantize(source)
        else:
            weight = self.constant((integers * scales[:, None, None, None]).astype(np.float32))
        return self.add("Conv", source, weight, bias, output=name, pads=[1, 1, 1, 1])

    def graph(self, output):
        shape = [1, CHANNELS, 6, 6]
        return Graph(
            nodes=self.nodes,
            constants=self.constants,
            inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            outputs=[helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
            opsets={"": self.opset},
            ir_version=8 if self.opset < 19 else 9,
        )


def residual(*, downsampled=False, opset=17):
    """relu(conv2(relu(conv1(x))) + skip), where the skip is conv1's activation or a convolution of its own."""
    made = Builder(opset)
    first = made.add("Relu", made.convolution("x", "conv1"), output="act1")
    main = made.convolution(first, "conv2")
    skip = made.convolution(first, "down") if downsampled else first
    return made.graph(made.add("Relu", made.add("Add", main, skip, output="sum"), output="y"))


def run(graph, x):
    model = graph.to_model()
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


@pytest.fixture
def x():
    return np.random.default_rng(1).standard_normal((1, CHANNELS, 6, 6)).astype(np.float32)


def lower(graph, x, **options):
    return lower_for_tensorrt(graph, INT8, TensorRtConfig(**options), [{"x": x}])


def test_weights_stand_in_float_before_quantizers_of_their_own(x):
    """TensorRT up to 8.2 refuses int8 constants."""
    expected = run(residual(), x)
    graph = residual()
    expand_weights(graph)
    written = [numpy_helper.to_array(tensor) for tensor in graph.to_model().graph.initializer]
    assert not any(array.dtype == np.int8 and array.any() for array in written)
    assert [n.op_type for n in graph.nodes].count("QuantizeLinear") == 4
    np.testing.assert_array_equal(run(graph, x), expected)


def test_expanded_weights_quantize_to_the_integers_they_were():
    made = Builder()
    made.convolution("x", "y")
    before = next(a for a in made.constants.values() if a.dtype == np.int8 and a.ndim == 4)
    graph = made.graph("y")
    expand_weights(graph)
    quantize = next(n for n in graph.nodes if n.op_type == "QuantizeLinear" and n.input[0] in graph.constants)
    weight, scale = (graph.constants[name] for name in quantize.input[:2])
    np.testing.assert_array_equal(np.rint(weight / scale[:, None, None, None]), before)
    # fp16 values and scales, as with tensorrt.int8_rest: fp16, give the same integers too
    half = weight.astype(np.float16) / scale.astype(np.float16)[:, None, None, None]
    np.testing.assert_array_equal(np.rint(half), before)


def test_a_skip_that_is_quantized_is_read_as_int8(x):
    lowered = lower(residual(), x)
    assert lowered.quantized_residuals == ("Add_sum",)
    graph = lowered.graph
    skip = next(n for n in graph.nodes if n.op_type == "Add").input[1]
    assert graph.producers()[skip].op_type == "DequantizeLinear"
    assert [n.op_type for n in graph.nodes].count("QuantizeLinear") == 4
    run(graph, x)


def test_a_skip_without_quantizers_gets_its_own_from_the_calibration_data(x):
    exact = run(residual(downsampled=True), x)
    lowered = lower(residual(downsampled=True), x)
    graph = lowered.graph
    skip = graph.producers()[next(n for n in graph.nodes if n.op_type == "Add").input[1]]
    quantize = graph.producers()[skip.input[0]]
    assert quantize.input[0] == "down"
    scale = float(graph.constants[quantize.input[1]])
    error = np.abs(run(graph, x) - exact).max()
    assert 0 < error <= scale / 2 * 1.001


def test_the_convolution_before_the_add_stays_unquantized(x):
    """Its output would otherwise be rounded before the add instead of after it."""
    graph = lower(residual(), x).graph
    assert graph.consumers()["conv2"][0].op_type == "Add"


def test_skips_stay_as_they_are_when_asked(x):
    lowered = lower(residual(), x, quantize_residuals=False)
    assert lowered.quantized_residuals == ()
    np.testing.assert_array_equal(run(lowered.graph, x), run(residual(), x))


def test_an_add_of_a_constant_is_no_residual(x):
    made = Builder()
    total = made.add("Add", made.convolution("x", "conv1"), made.constant(np.ones(1, np.float32)), output="y")
    assert lower(made.graph(total), x).quantized_residuals == ()


def test_an_add_after_a_float_layer_is_no_residual_of_int8(x):
    made = Builder()
    total = made.add("Add", made.convolution("x", "conv1", quantized=False), "x", output="y")
    assert lower(made.graph(total), x).quantized_residuals == ()


def test_layers_leave_int8_by_name(x):
    lowered = lower(residual(), x, mixed={"*conv1": "fp32"})
    assert lowered.released == ("Conv_conv1",)
    producers = lowered.graph.producers()
    conv1, conv2 = (n for n in lowered.graph.nodes if n.op_type == "Conv")
    assert conv1.input[0] == "x"
    assert lowered.graph.constants[conv1.input[1]].dtype == np.float32
    assert producers[conv2.input[1]].op_type == "DequantizeLinear"
    assert np.abs(run(lowered.graph, x) - run(residual(), x)).max() < 0.1


def test_the_last_glob_that_matches_decides(x):
    lowered = lower(residual(opset=19), x, mixed={"*": "fp32", "*conv1": "fp16"})
    types = lowered.graph.element_types()
    assert types["conv1"] == TensorProto.FLOAT16
    assert types["conv2"] == TensorProto.FLOAT


def test_a_glob_that_matches_nothing_names_what_is_near(x):
    with pytest.raises(ConfigError, match=r"tensorrt\.mixed.*'Conv_con3'.*Nearest: Conv_conv"):
        lower(residual(), x, mixed={"Conv_con3": "fp32"})


def test_the_rest_of_an_int8_graph_is_fp16_where_the_opset_allows(x):
    graph = lower(residual(opset=19), x, int8_rest="fp16").graph
    types = graph.element_types()
    assert {types[n.output[0]] for n in graph.nodes if n.op_type in ("Conv", "Relu", "Add")} == {
        TensorProto.FLOAT16
    }
    assert types["y"] == TensorProto.FLOAT
    scales = [graph.constants[n.input[1]].dtype for n in graph.nodes if n.op_type == "DequantizeLinear"]
    assert set(scales) == {np.dtype(np.float16)}
    np.testing.assert_allclose(run(graph, x), run(residual(), x), atol=0.1)


def test_older_opsets_leave_the_rest_to_a_flag(x):
    """TensorRT 8 has a flag for it, and its Q/DQ take float32 alone."""
    graph = lower(residual(), x, int8_rest="fp16").graph
    assert TensorProto.FLOAT16 not in graph.element_types().values()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"zero": 3}, "zero point int8 and 0"),
        ({"magnitude": -1.0}, "scales must be positive"),
    ],
)
def test_quantizers_that_tensorrt_refuses_are_named(change, text):
    made = Builder()
    graph = made.graph(made.add("Relu", made.quantize("x", **change), output="y"))
    with pytest.raises(ExportError, match=text):
        check_quantizers(graph)


def test_an_activation_with_many_scales_is_refused():
    made = Builder()
    parameters = [
        made.constant(np.full(CHANNELS, 0.1, np.float32)),
        made.constant(np.zeros(CHANNELS, np.int8)),
    ]
    quantized = made.add("QuantizeLinear", "x", *parameters, axis=1)
    graph = made.graph(made.add("DequantizeLinear", quantized, *parameters, axis=1, output="y"))
    with pytest.raises(ExportError, match="an activation has one scale"):
        check_quantizers(graph)


def test_uint8_is_refused():
    made = Builder()
    parameters = [made.constant(np.array(0.1, np.float32)), made.constant(np.array(0, np.uint8))]
    quantized = made.add("QuantizeLinear", "x", *parameters)
    graph = made.graph(made.add("DequantizeLinear", quantized, *parameters, output="y"))
    with pytest.raises(ExportError, match="zero point int8"):
        check_quantizers(graph)


def test_a_float_variant_is_converted_without_quantizers(x):
    made = Builder()
    graph = made.graph(made.convolution("x", "y", quantized=False))
    lowered = lower_for_tensorrt(graph, Precision.FP16, TensorRtConfig(), [{"x": x}])
    assert lowered.graph.element_types()["y"] == TensorProto.FLOAT
    assert [n.op_type for n in lowered.graph.nodes] == ["Cast", "Conv", "Cast"]

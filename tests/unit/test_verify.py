"""Parity of ONNX and PyTorch: what passes, what is refused, and what the refusal says."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from jetway.configs.schema import (
    BACKENDS,
    ExportConfig,
    Precision,
    QatConfig,
    TensorRtConfig,
    VerifyConfig,
)
from jetway.tasks.artifacts import OnnxModel
from jetway.tasks.calibration import calibration_batches
from jetway.tasks.checkpoint import save_checkpoint
from jetway.tasks.errors import ExportError, ParityError, QuantizationError
from jetway.tasks.export import export_onnx
from jetway.tasks.lower import lower_onnx
from jetway.tasks.qat import quantize_ptq
from jetway.tasks.verify import Limits, argmax_agreement, compare_outputs, nearest, verify_onnx
from jetway.tasks.workloads.digits import DigitsClassifier

WORKLOAD = DigitsClassifier(size=16, widths=(32, 64, 64), blocks=1)
CONFIG = VerifyConfig(samples=24)
INT8 = Precision.INT8_PTQ


@pytest.fixture(scope="module")
def ctx(make_context, tmp_path_factory):
    torch.set_num_threads(1)
    return make_context(WORKLOAD, tmp_path_factory.mktemp("verify"))


@pytest.fixture(scope="module")
def floating(ctx):
    """Not trained, but with BatchNorm statistics of real images and outputs that differ from each other."""
    torch.manual_seed(0)
    network = WORKLOAD.network().train()
    nn.init.normal_(network.classifier.weight)
    images = WORKLOAD.calibration_data().images[:32]
    with torch.no_grad():
        for _ in range(30):
            network(images)
    return save_checkpoint(ctx.store, network.eval(), structure=None)


@pytest.fixture(scope="module")
def quantized(ctx, floating):
    return quantize_ptq(ctx, floating, QatConfig(calibration_samples=32)).handle


@pytest.fixture(scope="module")
def float_model(ctx, floating):
    return export_onnx(ctx, floating, ExportConfig(), Precision.FP32).handle


@pytest.fixture(scope="module")
def int8_model(ctx, quantized):
    return export_onnx(ctx, quantized, ExportConfig(), INT8).handle


def lowered(ctx, model, precision, backend="ort-cpu", **tensorrt):
    config = QatConfig(calibration_samples=32)
    return lower_onnx(ctx, model, BACKENDS[backend], precision, config, TensorRtConfig(**tensorrt)).handle


@pytest.fixture(scope="module")
def lowered_model(ctx, int8_model):
    return lowered(ctx, int8_model, INT8)


def altered(ctx, handle):
    """The same ONNX file with the rows of its classifier's weight in reverse order."""
    model = onnx.load(ctx.store.open(handle))
    tensor = [t for t in model.graph.initializer if list(t.dims) == [10, 64]][-1]
    reverse = numpy_helper.to_array(tensor)[::-1].copy()
    tensor.CopyFrom(numpy_helper.from_array(reverse, tensor.name))
    with ctx.store.scratch() as folder:
        onnx.save(model, folder / "altered.onnx")
        return ctx.store.add(OnnxModel, folder / "altered.onnx", metadata=handle.metadata)


def test_verify_accepts_a_float_export(ctx, floating, float_model):
    output = verify_onnx(ctx, floating, float_model, CONFIG, Precision.FP32)
    report = ctx.store.load_json(output.handle)
    assert output.metrics["argmax_agreement"] == 1.0
    assert output.metrics["parity_excess"] < 0.1
    assert [entry["output"] for entry in report["outputs"]] == ["logits"]
    assert report["outputs"][0]["max_abs_error"] < 1e-4 * report["outputs"][0]["largest_magnitude"]


def test_verify_accepts_qdq_and_what_the_target_gets(ctx, quantized, int8_model, lowered_model):
    for model in (int8_model, lowered_model):
        output = verify_onnx(ctx, quantized, model, CONFIG, INT8)
        assert output.metrics["parity_excess"] < 1
        assert 0 < output.metrics["parity_rms_error_ratio"] < 0.1
    assert ctx.store.load_json(output.handle)["lowered_for"] == "onnxruntime"
    assert lowered_model.metadata["integer_macs_ratio"] > 0.5


def test_verify_tries_an_open_batch_with_another_size(ctx, floating):
    model = export_onnx(ctx, floating, ExportConfig(dynamic_batch=True), Precision.FP32).handle
    assert verify_onnx(ctx, floating, model, CONFIG, Precision.FP32).metrics["argmax_agreement"] == 1.0


@pytest.mark.parametrize("kind", ["float", "int8", "lowered"])
def test_verify_names_the_output_that_disagrees(ctx, floating, quantized, kind, request):
    fixture = {"float": "float_model", "int8": "int8_model", "lowered": "lowered_model"}[kind]
    model = altered(ctx, request.getfixturevalue(fixture))
    checkpoint, precision = (floating, Precision.FP32) if kind == "float" else (quantized, INT8)
    with pytest.raises(ParityError, match=r"output 'logits': at \[\d+, \d+\]") as caught:
        verify_onnx(ctx, checkpoint, model, CONFIG, precision)
    assert caught.value.output == "logits"
    assert caught.value.max_abs_error > 0
    assert ("verify.atol" if kind == "float" else "qat.keep_float") in str(caught.value)
    assert ("lowered for onnxruntime" in str(caught.value)) is (kind == "lowered")


def test_verify_refuses_classes_that_differ(ctx, floating, float_model):
    model = altered(ctx, float_model)
    config = CONFIG.model_copy(update={"atol": 1e6, "argmax_agreement": 0.98})
    with pytest.raises(ParityError, match=r"same class.*98\.00%"):
        verify_onnx(ctx, floating, model, config, Precision.FP32)


def test_verify_says_that_onnxruntime_refuses_a_model(ctx, floating, float_model):
    with ctx.store.scratch() as folder:
        (folder / "broken.onnx").write_bytes(b"not a model")
        broken = ctx.store.add(OnnxModel, folder / "broken.onnx", metadata=float_model.metadata)
    with pytest.raises(ExportError, match="refuses the exported model"):
        verify_onnx(ctx, floating, broken, CONFIG, Precision.FP32)


def compare(expected, actual, atol=0.1, rtol=0.0):
    limits = Limits(atol, rtol, None)
    return compare_outputs("y", np.array(expected), np.array(actual), limits, with_argmax=True)


def test_compare_outputs_takes_atol_as_a_fraction_of_the_largest_magnitude():
    assert compare([[100.0, 1.0]], [[100.0, 10.9]]).excess == pytest.approx(0.99)
    worst = compare([[100.0, 1.0]], [[100.0, 12.0]])
    assert worst.excess == pytest.approx(1.1)
    assert (worst.worst_index, worst.expected, worst.actual) == ((0, 1), 1.0, 12.0)


def test_compare_outputs_takes_rtol_as_a_fraction_of_each_value():
    assert compare([[100.0, 1.0]], [[101.0, 1.0]], atol=0.0, rtol=0.01).excess == pytest.approx(1.0)
    assert compare([[100.0, 1.0]], [[100.0, 1.1]], atol=0.0, rtol=0.01).excess == pytest.approx(10.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_compare_outputs_minds_values_that_are_not_finite(value):
    assert compare([[1.0, value]], [[1.0, value]]).excess == 0
    assert compare([[1.0, value]], [[1.0, 0.0]]).excess > 1
    assert compare([[1.0, 0.0]], [[1.0, value]]).excess > 1


def test_compare_outputs_passes_over_a_share_of_outliers_unless_they_are_not_finite():
    expected, actual = np.ones((1, 1000)), np.ones((1, 1000))
    actual[0, :3] = 9.0, 5.0, 1.05
    limits = Limits(0.1, 0.0, None, outliers=0.002)
    assert compare_outputs("y", expected, actual, limits, with_argmax=False).excess == pytest.approx(0.5)
    limits = Limits(0.1, 0.0, None, outliers=0.001)
    worst = compare_outputs("y", expected, actual, limits, with_argmax=False)
    assert (worst.excess, worst.worst_index, worst.max_abs_error) == (pytest.approx(40.0), (0, 1), 8.0)
    actual[0, 0] = np.nan
    limits = Limits(0.1, 0.0, None, outliers=0.002)
    assert compare_outputs("y", expected, actual, limits, with_argmax=False).excess == np.inf


def test_one_value_of_few_may_be_an_outlier_where_any_may():
    expected, actual = np.ones((1, 10)), np.ones((1, 10))
    actual[0, :2] = 9.0, 1.05
    few, none = Limits(0.1, 0.0, None, outliers=0.001), Limits(0.1, 0.0, None)
    assert compare_outputs("y", expected, actual, few, with_argmax=False).excess == pytest.approx(0.5)
    assert compare_outputs("y", expected, actual, none, with_argmax=False).excess == pytest.approx(80.0)


@pytest.mark.parametrize(("size", "outliers"), [(1, 0.001), (2, 0.001), (10, 0.95)])
def test_outliers_are_never_all_of_an_output(size, outliers):
    limits = Limits(0.1, 0.0, None, outliers=outliers)
    off = np.linspace(1.5, 9.0, size)
    found = compare_outputs("y", np.ones(size), off, limits, with_argmax=False)
    assert found.excess == pytest.approx(5.0), "the least of them counts"


def test_compare_outputs_tells_the_error_of_all_values_against_how_much_they_vary():
    assert compare([[0.0, 2.0, 0.0, 2.0]], [[0.5, 2.5, 0.5, 1.5]]).rms_error_ratio == pytest.approx(0.5)
    assert compare([[0.0, 2.0]], [[0.0, 2.0]]).rms_error_ratio == 0
    assert compare([[3.0, 3.0]], [[3.0, 3.5]]).rms_error_ratio == pytest.approx(0.5 / 2**0.5)
    assert compare([[0.0, 2.0, np.inf]], [[1.0, 1.0, np.inf]]).rms_error_ratio == pytest.approx(1.0)


def test_compare_outputs_accepts_no_error_where_none_is_allowed():
    assert compare([[0.0, 0.0]], [[0.0, 0.0]]).excess == 0
    assert compare([[0.0, 0.0]], [[0.0, 1e-9]]).excess > 1


def test_what_ptq_would_only_make_worse_is_no_disagreement(ctx, floating):
    """Quantizers that cut off most of it; layers that stay in float do not."""
    section = QatConfig(calibration_samples=32, calibration="percentile", percentile=95)
    cut_off = quantize_ptq(ctx, floating, section).handle
    model = lowered(ctx, export_onnx(ctx, cut_off, ExportConfig(), INT8).handle, INT8)
    assert model.metadata["float_islands"]
    report = ctx.store.load_json(verify_onnx(ctx, cut_off, model, CONFIG, INT8).handle)
    trained = model.model_copy(update={"metadata": {**model.metadata, "float_islands": []}})
    strict = VerifyConfig(samples=24, int8_atol=report["outputs"][0]["excess"] * CONFIG.int8_atol + 0.01)
    with pytest.raises(ParityError):
        verify_onnx(ctx, cut_off, trained, strict, INT8)
    with pytest.raises(ParityError):
        verify_onnx(ctx, cut_off, altered(ctx, model), CONFIG, INT8)


def test_nearest_lies_between_the_references():
    values = np.array([0.0, 1.5, 9.0, np.nan, np.inf])
    low, high = np.full(5, 1.0), np.full(5, 2.0)
    assert nearest(values, [high, low]).tolist() == [1.0, 1.5, 2.0, 2.0, 2.0]
    assert nearest(values, [low]).tolist() == [1.0] * 5


@pytest.mark.parametrize(("shape", "axis"), [((8, 5), -1), ((2, 6, 5), -1), ((2, 5, 3, 3), 1)])
def test_argmax_agreement_looks_along_the_classes(shape, axis):
    expected = np.random.default_rng(0).standard_normal(shape)
    assert argmax_agreement(expected, expected + 1) == 1.0
    assert argmax_agreement(expected, np.roll(expected, 1, axis)) == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8_CALIBRATED])
def test_lower_onnx_passes_a_float_model_as_it_is(ctx, float_model, backend, precision):
    unchanged = lowered(ctx, float_model, precision, backend)
    assert unchanged == float_model
    assert unchanged.metadata["precision"] == precision


LOW = [
    (Precision.FP16, {}),
    (Precision.BF16, {}),
    (Precision.FP16, {"mixed": {"*stem*": "fp32"}}),
    (INT8, {}),
    (INT8, {"quantize_residuals": False}),
    (INT8, {"mixed": {"*stem*": "fp32"}}),
]


@pytest.mark.parametrize(("precision", "options"), LOW)
def test_verify_accepts_what_tensorrt_gets(
    ctx, floating, quantized, float_model, int8_model, precision, options
):
    checkpoint, model = (quantized, int8_model) if precision is INT8 else (floating, float_model)
    form = lowered(ctx, model, precision, "tensorrt", **options)
    assert (form.metadata["precision"], form.metadata["lowered_for"]) == (precision, "tensorrt")
    assert 0 < verify_onnx(ctx, checkpoint, form, CONFIG, precision).metrics["parity_excess"] < 1


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_verify_names_the_key_for_a_float_type_that_is_off(ctx, floating, float_model, precision):
    form = altered(ctx, lowered(ctx, float_model, precision, "tensorrt"))
    with pytest.raises(ParityError, match=rf"tensorrt\.mixed.*verify\.{precision}_atol"):
        verify_onnx(ctx, floating, form, CONFIG, precision)


def test_lower_onnx_lists_its_float_islands(lowered_model):
    islands = lowered_model.metadata["float_islands"]
    assert islands[0]["name"].endswith("stem.0/Conv")
    assert all(island["reason"] for island in islands)
    assert lowered_model.metadata["precision"] == INT8


def test_calibration_batches_fill_the_last_one():
    class Batched(DigitsClassifier):
        def example_inputs(self):
            return {"image": torch.zeros(4, 1, 16, 16)}

    sizes = [len(batch["image"]) for batch in calibration_batches(Batched(size=16), 10)]
    assert sizes == [4, 4, 4]


def test_calibration_batches_need_data():
    class Empty(DigitsClassifier):
        def calibration_data(self):
            return []

    with pytest.raises(QuantizationError, match="calibration_data"):
        next(calibration_batches(Empty(size=16), 10))

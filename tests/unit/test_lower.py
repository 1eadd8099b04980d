import onnx
import pytest

from jetway.configs.schema import BACKENDS, ExportConfig, Precision, QatConfig, TensorRtConfig, VerifyConfig
from jetway.tasks.checkpoint import save_checkpoint
from jetway.tasks.export import export_onnx
from jetway.tasks.lower import lower, lower_onnx
from jetway.tasks.verify import verify_onnx
from jetway.tasks.workloads.digits import DigitsClassifier


def test_raising_the_revision_of_qat_lowers_again(make_context, tmp_path):
    context = make_context(DigitsClassifier(), tmp_path, reuse=True)
    checkpoint = save_checkpoint(context.store, context.workload.network(), structure=None)
    model = export_onnx(context, checkpoint, ExportConfig(), Precision.FP32).handle
    cached = []
    for revision in (1, 1, 2):
        config = QatConfig(revision=revision)
        lower.fn(context, model, BACKENDS["ort-cpu"], Precision.FP32, config, TensorRtConfig())
        cached.append(context.finished[-1].cached)
    assert cached == [False, True, False]


@pytest.mark.parametrize(("network", "operator"), [("Swin", "MatMulInteger"), ("Residual", "ConvInteger")])
def test_dynamic_quantization_multiplies_integers_and_agrees(
    make_context, small_workload, tmp_path, network, operator, capfd
):
    context = make_context(small_workload(network=network), tmp_path)
    precision = Precision.INT8_DYNAMIC
    checkpoint = save_checkpoint(context.store, context.workload.network().eval(), structure=None)
    model = export_onnx(context, checkpoint, ExportConfig(), precision.exported).handle
    arguments = (model, BACKENDS["ort-cpu"], precision, QatConfig(), TensorRtConfig())
    lowered = lower_onnx(context, *arguments).handle
    operators = [node.op_type for node in onnx.load(context.store.open(lowered)).graph.node]
    assert operator in operators
    assert "QuantizeLinear" not in operators
    assert verify_onnx(context, checkpoint, lowered, VerifyConfig(), precision).metrics["parity_excess"] < 1
    assert lower_onnx(context, *arguments).handle == lowered
    assert capfd.readouterr().err == ""

"""Networks of many kinds, lowered for TensorRT in every precision and held against PyTorch."""

import onnx
import pytest
import torch

from jetway.configs.schema import BACKENDS, ExportConfig, Precision, QatConfig, TensorRtConfig, VerifyConfig
from jetway.tasks.checkpoint import save_checkpoint
from jetway.tasks.export import export_onnx
from jetway.tasks.lower import lower_onnx
from jetway.tasks.qat import quantize_ptq
from jetway.tasks.verify import verify_onnx

NETWORKS = ("Residual", "Grouped", "Vit", "Multihead", "Tokens", "Shuffled")
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
#: Attention has no form in opset 13, the newest of TensorRT 8.2.
CONVOLUTIONAL = ("Residual", "Grouped", "Shuffled")
QAT = QatConfig(calibration_samples=16)
FORMS = [
    (Precision.FP16, 17, {}),
    (Precision.BF16, 17, {}),
    (Precision.INT8_PTQ, 17, {}),
    (Precision.INT8_PTQ, 13, {}),
    (Precision.INT8_PTQ, 19, {"int8_rest": "fp16"}),
]


@pytest.fixture(scope="module", params=NETWORKS)
def trained(request, small_workload, make_context, tmp_path_factory):
    """A context, and the float checkpoint of a network with weights as they come."""
    torch.manual_seed(0)
    context = make_context(small_workload(network=request.param), tmp_path_factory.mktemp(request.param))
    network = context.workload.network().eval()
    return context, save_checkpoint(context.store, network, structure=None)


@pytest.mark.parametrize(("precision", "opset", "options"), FORMS)
def test_what_tensorrt_gets_agrees_with_pytorch(trained, precision, opset, options):
    context, checkpoint = trained
    if opset == 13 and context.workload.network_class.__name__ not in CONVOLUTIONAL:
        opset = 14
    if precision.has_quantizers:
        checkpoint = quantize_ptq(context, checkpoint, QAT).handle
    model = export_onnx(context, checkpoint, ExportConfig(opset=opset), precision.exported).handle
    lowered = lower_onnx(
        context, model, BACKENDS["tensorrt"], precision, QAT, TensorRtConfig(**options)
    ).handle
    assert lowered.metadata["kept_in_fp32"] == []
    onnx.checker.check_model(onnx.load(context.store.open(lowered)), full_check=True)
    verify_onnx(context, checkpoint, lowered, VerifyConfig(samples=16, int8_atol=0.15), precision)
